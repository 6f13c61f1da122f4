"""Minibehavior: what pick, drop and toggle do, and eights in which neither room nor list tells the answer."""

import json

import numpy as np
import pytest
from worlds import specs

from mmroute import hub
from mmroute.tasks import _errands
from mmroute.tasks.base import Spec

UP, LEFT, DOWN, RIGHT, PICK, DROP, TOGGLE = range(7)
# 1 is wall; start S, printer P, table T:
#   # # # # #
#   # S . P #
#   # . . . #
#   # . T . #
#   # # # # #
WORLD = {
    "walls": [[1] * 5, [1, 0, 0, 0, 1], [1, 0, 0, 0, 1], [1, 0, 0, 0, 1], [1] * 5],
    "start": [1, 1],
    "printer": [1, 3],
    "table": [3, 2],
}


@pytest.mark.parametrize(
    ("actions", "outcome", "hops"),
    [
        ([RIGHT, PICK, DOWN, DROP, TOGGLE], "success", 5),
        ([RIGHT, PICK, DOWN, DROP, TOGGLE, PICK, UP], "success", 5),  # what comes after the end is not executed
        ([RIGHT, PICK, DOWN, DROP], "missing_step", 4),
        ([RIGHT, PICK, DOWN, DROP, UP, TOGGLE], "missing_step", 6),  # switched on from too far
        ([RIGHT, PICK, DOWN, TOGGLE], "missing_step", 4),
        ([PICK, RIGHT], "pickup_error", 1),
        ([RIGHT, PICK, PICK], "pickup_error", 3),
        ([RIGHT, PICK, DROP], "drop_error", 3),  # no table beside
        ([DOWN, DOWN, DROP], "drop_error", 3),  # beside the table with nothing in hand
        ([UP, UP, UP], "missing_step", 3),
    ],
)
def test_errands_end_as_the_rules_say(actions, outcome, hops):
    moments = _errands.run(WORLD, actions)
    assert _errands.CLASSES[_errands.outcome(moments)] == outcome
    assert len(moments) - 1 == hops


def test_printer_and_table_block_until_the_printer_is_taken():
    moments = _errands.run(WORLD, [RIGHT, RIGHT, PICK, RIGHT, DOWN, DOWN, LEFT])
    assert [m.event for m in moments[1:]] == ["floor", "printer", "printer", "floor", "floor", "floor", "table"]
    assert [m.agent for m in moments[-2:]] == [(3, 3), (3, 3)]


def test_a_chain_reads_what_it_looks_at_and_where_it_stays():
    actions = [UP, RIGHT, PICK, DOWN, DROP, TOGGLE]
    spec = Spec("minibehavior", 1, "small", "train", 0, 5, 10, (2, 3), 5, WORLD | {"actions": actions}, 0, "")
    task = hub.load("tasks", "minibehavior", hop_text="sentence")
    assert " ".join(task.words(spec, "cot").response) == (
        "start r3c4 . s1 up r2c4 wall r3c4 s2 right r3c5 floor s3 pick r3c6 printer s4 down r4c5 floor "
        "s5 drop r5c5 table s6 toggle r5c5 success answer: success <|im_end|>"
    )
    told = [h.text for h in task.sample(spec).hops]
    assert told[0] == "In step 1, moving up, I run into the wall and stay at row 1 column 1. Carrying objects: None."
    assert told[2] == "In step 3, I pick the printer up at row 1 column 2. Carrying objects: printer_0."
    assert told[5].endswith("switches the printer on. Carrying objects: None.")


def test_of_an_eight_a_list_has_every_answer_and_a_room_two():
    task = hub.load("tasks", "minibehavior", variant="quad")
    for unit in range(6):
        eight = specs(task, "train", 8, 8 * unit)
        by_room: dict[str, list[int]] = {}
        by_list: dict[str, list[int]] = {}
        for s in eight:
            room = json.dumps([s.world[k] for k in ("walls", "start", "printer", "table")])
            by_room.setdefault(room, []).append(s.answer)
            by_list.setdefault(json.dumps(s.world["actions"]), []).append(s.answer)
        assert [sorted(answers) for answers in by_list.values()] == [[0, 1, 2, 3]] * 2
        assert [len(set(answers)) for answers in by_room.values()] == [2] * 4
        assert len({s.group for s in eight}) == 1


def test_labels_of_many_lists_in_many_rooms_are_those_of_single_runs():
    task, rng = hub.load("tasks", "minibehavior"), np.random.default_rng(1)
    worlds = [world for world, _ in task._rooms(rng, 8, 8, "train")]
    lists = _errands.draw_lists(rng, worlds, 8)
    found = _errands.classes_of(worlds, lists, 8)
    assert len(np.unique(found)) > 3
    for i, world in enumerate(worlds[:8]):
        for k, actions in enumerate(lists):
            moments = _errands.run(world, actions)
            ended = len(moments) - 1
            assert found[i, k] == (_errands.outcome(moments) if abs(ended - 8) <= 2 else -1)


@pytest.mark.parametrize("length", [1, 2, 3, 9, 14])
def test_the_stream_has_every_class_that_fits(length):
    task, rng = hub.load("tasks", "minibehavior"), np.random.default_rng(0)
    made = [task.stream(rng, 8, length) for _ in range(60)]
    assert {s.answer for s in made} == ({0, 1, 2, 3} if length >= 3 else {1, 2, 3})
    assert all(len(task.trace(s)) - 1 == length for s in made)
