"""Boxes as they are written, and the cells that they touch."""

import pytest

from mmroute import hub

READ = {
    "The ball <coor> 0.10,0.25,0.50,0.75 </coor>": (0.1, 0.25, 0.5, 0.75),
    "<coor> 0.1,0.2,0.3,0.4</coor>": (0.1, 0.2, 0.3, 0.4),  # as Mistral's tokenizer gives it back
    "<coor>0.1, 0.2, 0.3, 0.4</coor>": (0.1, 0.2, 0.3, 0.4),
    "a <coor> 0.0,0.0,0.2,0.2 </coor> b <coor> 0.3,0.3,1.0,1.0 </coor>": (0.3, 0.3, 1.0, 1.0),
    "<coor> 0.1,0.2,1.5,0.4 </coor>": (0.1, 0.2, 1.0, 0.4),  # a box over the edge ends there
    "<coor> 0,0,1,1 </coor>": (0.0, 0.0, 1.0, 1.0),
    "<coor> 0.10,0.25,0.50,0.75 </coor> is": None,  # it has ended before
    "<coor> 0.10,0.25,0.50 </coor>": None,
    "<coor> 0.1,0.2,0.3,0.4,0.5 </coor>": None,
    "<coor> 0.5,0.2,0.5,0.4 </coor>": None,  # no width
    "<coor> 0.1,0.6,0.3,0.4 </coor>": None,
    "<coor> a,b,c,d </coor>": None,
    "0.1,0.2,0.3,0.4 </coor>": None,
    "<coor> -0.1,0.2,0.3,0.4 </coor>": None,
    "": None,
}


@pytest.mark.parametrize("text", READ, ids=repr)
def test_a_box_is_read_where_a_text_ends_with_one(text):
    assert hub.load("think", "boxes").box_at(text) == READ[text]


@pytest.mark.parametrize("side", [1, 3, 4, 24, 100])
def test_the_window_holds_the_cells_that_the_box_touches_and_no_other(side):
    think, turned = hub.load("think", "boxes"), hub.load("think", "boxes", cells="transposed")
    edges = [i / 100 for i in range(0, 101, 7)] + [0.29, 0.58, 1.0]
    for x1, x2, y1, y2 in [(a, b, c, d) for a in edges for b in edges[::3] for c in edges[::4] for d in edges[::5]]:
        if x1 >= x2 or y1 >= y2:
            continue
        columns = [c for c in range(side) if c < round(x2 * side, 6) and c + 1 > round(x1 * side, 6)]
        rows = [r for r in range(side) if r < round(y2 * side, 6) and r + 1 > round(y1 * side, 6)]
        window = think.window((x1, y1, x2, y2), side, side)
        assert window == (rows[0], columns[0], len(rows), len(columns))
        assert turned.window((x1, y1, x2, y2), side, side) == (columns[0], rows[0], len(columns), len(rows))
