"""What the page at `/` is made of: its files, and questions to try where the bundled model answers."""

import base64
import io
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

__all__ = ["PAGES", "drawn", "page"]

PAGES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
"""Path -> file beside this one, and its type."""
_CSP = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


async def page(request: Request) -> Response:
    """A file of the page; nothing in it may reach another address."""
    name, kind = PAGES[request.url.path]
    text = files("mmroute.serve").joinpath("page", name).read_text(encoding="utf-8")
    headers = {"content-security-policy": _CSP, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return Response(text, media_type=kind, headers={**headers, "cache-control": "no-cache"})


def drawn(kind: str, number: int) -> dict[str, Any]:
    """A generated question as the page shows it: its words, pictures as data URLs, and the right answer.

    Args:
        kind: name of a world.
        number: which item of its split test.
    """
    from mmroute import hub  # torch

    task = hub.load("tasks", kind)
    sample = next(task.samples("test", 1, offset=number))
    words, images = [], []
    for block in task.messages(sample, "cot")[0]["content"]:
        words.append(block["text"] if block["type"] == "text" else "<image>")
        if block["type"] == "image":
            data = io.BytesIO()
            block["image"].save(data, "PNG")
            images.append(f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}")
    return {"question": " ".join(words), "images": images, "answer": sample.answer_text.removeprefix("answer: ")}
