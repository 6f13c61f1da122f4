"""Small pictures as SVG text: curves, maps, and images with boxes, side by side. The same figures give the same bytes.

Source: ours; pictures of a whole bench are matplotlib's (`plot.py`), these need no extra.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, isfinite

from PIL import Image

__all__ = ["COLOURS", "Chart", "Heat", "Photo", "safe", "sheet"]

COLOURS = ("#b5402a", "#1f6f8b", "#5b8c3a", "#8a5a9e", "#c98a1b", "#3d3d3d", "#c2557f", "#3a9c8f")
_WIDE, _HIGH, _LEFT, _TOP, _BOTTOM = 330, 220, 46, 26, 34
"""Pixels of one panel, and of the margins inside it."""


@dataclass(frozen=True)
class Chart:
    """Curves over a number."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    """Points by name; a name has one colour in the whole sheet."""
    x: str = ""
    y: str = ""
    spans: Sequence[tuple[float, float, str]] = ()
    """(from, to, name): stretches with a background in the name's colour."""


@dataclass(frozen=True)
class Heat:
    """A table of numbers as colours, white for the least and dark for the largest."""

    title: str
    rows: Sequence[Sequence[float | None]]
    x: str = ""
    y: str = ""
    labels: Sequence[str] = ()
    """Of the rows."""


@dataclass(frozen=True)
class Photo:
    """An image with marked cells and boxes."""

    title: str
    image: Image.Image
    cells: Sequence[tuple[float, float, float, float, float]] = ()
    """(left, top, right, bottom, strength in [0, 1]) in pixels of the image: tinted."""
    boxes: Sequence[tuple[float, float, float, float, str]] = field(default_factory=tuple)
    """(left, top, right, bottom, name) in pixels of the image: outlined in the name's colour."""


def safe(text: str) -> str:
    """Text as SVG may hold it.

    Example:
        >>> safe("a < b & c")
        'a &lt; b &amp; c'
    """
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def sheet(title: str, panels: Sequence[Chart | Heat | Photo], columns: int = 3) -> str:
    """Panels row by row under a title, with one legend.

    Args:
        title: of the whole.
        panels: in reading order.
        columns: panels beside each other.
    """
    names: dict[str, str] = {}
    for panel in panels:
        used = [*panel.lines, *(s[2] for s in panel.spans)] if isinstance(panel, Chart) else []
        used += [b[4] for b in panel.boxes] if isinstance(panel, Photo) else []
        for name in used:
            names.setdefault(name, COLOURS[len(names) % len(COLOURS)])
    columns = max(1, min(columns, len(panels)))
    width, height = _WIDE * columns + 10, _HIGH * ceil(len(panels) / columns) + 58
    parts, at = [], 12
    for name, colour in names.items():
        parts.append(f'<rect x="{at}" y="32" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{at + 14}" y="41">{safe(name)}</text>')
        at += 26 + 7 * len(name)
    draw = {Chart: _chart, Heat: _heat, Photo: _photo}
    for i, panel in enumerate(panels):
        inside = draw[type(panel)](panel, names)  # type: ignore[operator]
        label = f'<text x="{_LEFT}" y="16" font-weight="bold">{safe(panel.title)}</text>'
        parts.append(
            f'<g transform="translate({_WIDE * (i % columns)},{50 + _HIGH * (i // columns)})">{label}{inside}</g>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(width, at)} {height}" font-family="sans-serif"\n'
        f' font-size="11">\n<rect width="{max(width, at)}" height="{height}" fill="white"/>\n'
        f'<text x="12" y="20" font-size="14">{safe(title)}</text>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _axes(x: str, y: str) -> str:
    foot = _HIGH - _BOTTOM
    return (
        f'<path d="M{_LEFT} {_TOP}V{foot}H{_WIDE - 12}" fill="none" stroke="#888"/>'
        f'<text x="{(_LEFT + _WIDE) / 2:.0f}" y="{_HIGH - 4}" text-anchor="middle">{safe(x)}</text>'
        f'<text x="12" y="{_HIGH // 2}" text-anchor="middle" transform="rotate(-90 12 {_HIGH // 2})">{safe(y)}</text>'
    )


def _chart(panel: Chart, names: Mapping[str, str]) -> str:
    points = [p for line in panel.lines.values() for p in line if isfinite(p[1])]
    ends = [x for start, end, _ in panel.spans for x in (start, end)] + [x for x, _ in points]
    if not points:
        return _axes(panel.x, panel.y)
    low, high, top = min(ends), max(ends), max(y for _, y in points)
    floor = min(0.0, *(y for _, y in points))
    wide, tall = _WIDE - _LEFT - 14, _HIGH - _TOP - _BOTTOM

    def across(x: float) -> float:
        return _LEFT + wide * (x - low) / ((high - low) or 1.0)

    def up(y: float) -> float:
        return _TOP + tall * (1 - (y - floor) / ((top - floor) or 1.0))

    out = [
        f'<rect x="{across(a):.1f}" y="{_TOP}" width="{max(across(b) - across(a), 0.5):.1f}" height="{tall}" '
        f'fill="{names[name]}" fill-opacity="0.18"/>'
        for a, b, name in panel.spans
    ]
    for name, line in panel.lines.items():
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line if isfinite(y))
        out.append(f'<polyline points="{path}" fill="none" stroke="{names[name]}" stroke-width="1.5"/>')
    for value, place in ((top, _TOP + 8), (floor, _HIGH - _BOTTOM)):
        out.append(f'<text x="{_LEFT - 4}" y="{place}" text-anchor="end" font-size="9">{value:.3g}</text>')
    for value, anchor, place in ((low, "start", _LEFT), (high, "end", _WIDE - 12)):
        out.append(f'<text x="{place}" y="{_HIGH - 20}" text-anchor="{anchor}" font-size="9">{value:g}</text>')
    return "".join(out) + _axes(panel.x, panel.y)


def _heat(panel: Heat, names: Mapping[str, str]) -> str:
    known = [v for row in panel.rows for v in row if v is not None and isfinite(v)]
    top = max(known, default=0.0) or 1.0
    rows, columns = len(panel.rows), max(map(len, panel.rows), default=1)
    wide, tall = (_WIDE - _LEFT - 14) / max(columns, 1), (_HIGH - _TOP - _BOTTOM) / max(rows, 1)
    out = []
    for r, row in enumerate(panel.rows):
        if panel.labels:
            place = _TOP + tall * (r + 0.5) + 3
            out.append(
                f'<text x="{_LEFT - 4}" y="{place:.1f}" text-anchor="end" font-size="9">{safe(panel.labels[r])}</text>'
            )
        for c, value in enumerate(row):
            if value is None:
                continue
            out.append(
                f'<rect x="{_LEFT + wide * c:.1f}" y="{_TOP + tall * r:.1f}" width="{wide:.1f}" height="{tall:.1f}" '
                f'fill="{COLOURS[1]}" fill-opacity="{max(value, 0) / top:.2f}"><title>{value:.3g}</title></rect>'
            )
    return "".join(out) + _axes(panel.x, "" if panel.labels else panel.y)


def _photo(panel: Photo, names: Mapping[str, str]) -> str:
    file = io.BytesIO()
    panel.image.convert("RGB").save(file, "PNG")
    size = min((_WIDE - 24) / panel.image.width, (_HIGH - _TOP - 10) / panel.image.height)
    data = base64.b64encode(file.getvalue()).decode()
    out = [
        f'<image width="{panel.image.width}" height="{panel.image.height}" image-rendering="pixelated" '
        f'href="data:image/png;base64,{data}"/>'
    ]
    for left, upper, right, lower, strength in panel.cells:
        out.append(
            f'<rect x="{left:.1f}" y="{upper:.1f}" width="{right - left:.1f}" height="{lower - upper:.1f}" '
            f'fill="{COLOURS[4]}" fill-opacity="{0.75 * strength:.2f}"/>'
        )
    for left, upper, right, lower, name in panel.boxes:
        out.append(
            f'<rect x="{left:.1f}" y="{upper:.1f}" width="{right - left:.1f}" height="{lower - upper:.1f}" '
            f'fill="none" stroke="{names[name]}" stroke-width="{2 / size:.2f}"/>'
        )
    return f'<g transform="translate(12,{_TOP}) scale({size:.3f})">{"".join(out)}</g>'
