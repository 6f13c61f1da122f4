"""One SVG of a view: the picture once per layer, with the patches that the layer did not run darkened.

python -m mmroute.page.strip docs/kept.svg --recipe schedule
"""

from pathlib import Path
from typing import Annotated

import typer

from mmroute.page import View

__all__ = ["strip"]

SIDE, GAP, CAPTION = 150, 14, 34


def strip(view: View) -> str:
    """The SVG text; it holds its picture and refers to nothing outside."""
    rows, columns = view.grid
    width = (SIDE + GAP) * len(view.kept) + GAP
    height = SIDE + CAPTION + 2 * GAP
    w, h = SIDE / columns, SIDE / rows
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#f7f8fa"/>',
        f'<defs><image id="picture" width="{SIDE}" height="{SIDE}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="{view.image}"/></defs>',
    ]
    num_patches = sum(t["vision"] >= 0 for t in view.tokens)
    num_words = len(view.tokens) - num_patches
    for layer, kept in enumerate(view.kept):
        x = GAP + layer * (SIDE + GAP)
        ran = set(kept)
        dark = [t["vision"] for i, t in enumerate(view.tokens) if t["vision"] >= 0 and i not in ran]
        words = sum(view.tokens[i]["vision"] < 0 for i in kept)
        cells = "".join(f"M{p % columns * w:.2f} {p // columns * h:.2f}h{w:.2f}v{h:.2f}h-{w:.2f}z" for p in dark)
        parts += [
            f'<g transform="translate({x} {GAP})"><use href="#picture"/>',
            f'<path d="{cells}" fill="#10141c" fill-opacity="0.82"/>',
            f'<text y="{SIDE + 16}" fill="#1c2330" font-weight="600">layer {layer}</text>',
            f'<text y="{SIDE + 31}" fill="#5b6577">{num_patches - len(dark)} of {num_patches} patches, '
            f"{words} of {num_words} words</text></g>",
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
    beside = out.with_name(out.name + ".part")
    beside.write_text(strip(view))
    beside.replace(out)
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
