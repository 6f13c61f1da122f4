"""One SVG of a view: the picture once per layer, with the patches that the layer did not run darkened.

python -m mmroute.page.strip docs/kept.svg --recipe schedule
"""

from pathlib import Path
from typing import Annotated

import typer

from mmroute.files import write_text
from mmroute.page import View
from mmroute.tokens import Modality

__all__ = ["strip"]

SIDE, GAP, CAPTION = 150, 14, 48


def strip(view: View) -> str:
    """The SVG text of the prompt and its first picture; it holds its picture and refers to nothing outside."""
    picture = view.pictures[0]
    rows, columns, start = picture["rows"], picture["columns"], picture["start"]
    width = (SIDE + GAP) * len(view.ran) + GAP
    height = SIDE + CAPTION + 2 * GAP
    w, h = SIDE / columns, SIDE / rows
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#f7f8fa"/>',
        f'<defs><image id="picture" width="{SIDE}" height="{SIDE}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="{picture["png"]}"/></defs>',
    ]
    num_patches = rows * columns
    text = {c for c, kind in enumerate(view.modality) if kind == Modality.TEXT and view.hop[c] == 0}
    for layer, columns_ran in enumerate(view.ran):
        x = GAP + layer * (SIDE + GAP)
        ran = set(columns_ran)
        dark = [p for p in range(num_patches) if start + p not in ran]
        cells = "".join(f"M{p % columns * w:.2f} {p // columns * h:.2f}h{w:.2f}v{h:.2f}h-{w:.2f}z" for p in dark)
        parts += [
            f'<g transform="translate({x} {GAP})"><use href="#picture"/>',
            f'<path d="{cells}" fill="#10141c" fill-opacity="0.82"/>',
            f'<text y="{SIDE + 16}" fill="#1c2330" font-weight="600">layer {layer}</text>',
            f'<text y="{SIDE + 31}" fill="#5b6577">{num_patches - len(dark)} of {num_patches} patches</text>',
            f'<text y="{SIDE + 45}" fill="#5b6577">{len(text & ran)} of {len(text)} words</text></g>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def main(
    out: Path,
    recipe: Annotated[str, typer.Option(help="How to route.")] = "schedule",
    model: Annotated[str, typer.Option(help="Bundled name, folder or hub id.")] = "tiny",
) -> None:
    """Draws which patches each layer runs on the demo's longest maze."""
    from mmroute import demo

    view = demo.example(model, recipe)
    write_text(out, strip(view))
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
