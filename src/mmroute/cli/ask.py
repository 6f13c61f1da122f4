"""`mmroute ask`: one question about images, any model folder or hub id."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmroute.cli._model import Device, Dtype, open_model
from mmroute.files import write_text

__all__ = ["ask"]


def ask(
    question: str,
    image: Annotated[list[str] | None, typer.Option("-i", "--image", help="Image file; repeatable.")] = None,
    model: Annotated[str, typer.Option(help="Model folder, hub id, or the bundled `tiny`.")] = "tiny",
    recipe: Annotated[str, typer.Option(help="How to route and think; see `mmroute list recipes`.")] = "none",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override, e.g. prune.vision_keep=0.3.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write what happened there, for `mmroute inspect`; .json.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "",
) -> None:
    """Answer one question about images."""
    from mmroute import recipe as recipes  # torch costs seconds; --help must not pay them
    from mmroute.backbones.images import check_given, open_images
    from mmroute.cost import estimate_flops, estimate_kv_bytes, keep_shares
    from mmroute.page.story import tell
    from mmroute.reason import converse

    settings = recipes.read(recipe, set_)
    check_given(question, image or [])
    pictures = open_images(image or [])  # what cannot be asked is said before a model is loaded
    with recipes.equip(open_model(model, device, dtype), settings) as (routed, think):
        routed.full_trace = trace is not None
        conversation = converse(routed, question, pictures, think)
        answer = routed.answer_many([conversation], think=think)[0]
        if trace is not None:
            write_text(trace, tell(routed, conversation, answer, recipe=settings.name).to_json())
    if not json_:
        print(answer.text)
        return
    out = {
        "question": question,
        "answer": answer.text,
        "hops": answer.hops,
        "ar_steps": answer.ar_steps,
        "finished": answer.finished,
        "flops": estimate_flops(answer.trace).total,
        "kv_bytes": estimate_kv_bytes(answer.trace),
        "keep": keep_shares(answer.trace),
    }
    sys.stdout.write(json.dumps(out) + "\n")
