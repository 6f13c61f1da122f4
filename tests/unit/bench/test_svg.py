"""Small pictures are well-formed, say what they were told, and place points where they belong."""

import re
import xml.etree.ElementTree as ElementTree
from math import nan

import pytest
from PIL import Image

from mmroute.bench.svg import COLOURS, Chart, Heat, Photo, safe, sheet

PANELS = [
    Chart("a < b", {"up": [(0, 0.0), (1, 1.0), (2, 4.0)], "gone": [(0, nan)]}, "x & y", "z", [(0, 1, "span")]),
    Heat("map", [[0.0, 1.0], [None, 0.5]], "column", labels=["r0", "r1"]),
    Photo("image", Image.new("RGB", (4, 4), "red"), [(0, 0, 1, 1, 0.5)], [(1, 1, 3, 3, "box")]),
    Chart("nothing", {}),
]


def test_a_sheet_is_one_tree_with_a_legend_and_the_same_every_time():
    text = sheet("title & more", PANELS, columns=2)
    tree = ElementTree.fromstring(text)
    assert text == sheet("title & more", PANELS, columns=2)
    assert tree.tag.endswith("svg")
    words = [node.text for node in tree.iter() if node.tag.endswith("text")]
    for word in ("title & more", "a < b", "x & y", "up", "span", "box", "r1"):
        assert word in words
    assert safe("<&>") == "&lt;&amp;&gt;"
    assert f'fill="{COLOURS[0]}"' in text


def test_a_curve_rises_from_left_to_right_and_a_map_darkens():
    text = sheet("t", PANELS[:1])
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', text)[1].split()]
    xs, ys = zip(*points, strict=True)
    assert list(xs) == sorted(xs)
    assert ys[0] > ys[1] > ys[2], "upwards is smaller"
    assert (ys[0] - ys[1]) * 4 == pytest.approx(ys[0] - ys[2], rel=0.01)
    heat = sheet("t", PANELS[1:2])
    assert re.findall(r'fill-opacity="([\d.]+)"><title>', heat) == ["0.00", "1.00", "0.50"]
