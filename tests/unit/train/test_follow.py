"""Who follows a run: a bar on terminals only, TensorBoard with every number; a missing package is named."""

import io
import logging
import sys

import pytest
from rich.console import Console

from mmroute.errors import MissingExtra
from mmroute.train.follow import Bar, Board, following
from mmroute.train.loop import Journal


def run(journal, done, total):
    journal.begin(done, total)
    for step in range(done + 1, total + 1):
        journal.write(step=step, stage="A", loss=1 / step, ramp={"text": 0.5}, vision=[0.25, 0.5], ok=True)
    journal.write(step=total, look={"maze": {"chain": 0.75}})


def test_a_terminal_sees_how_far_the_run_is(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with following(console=console) as followers:
        assert [type(f) for f in followers] == [Bar]
        run(Journal(tmp_path / "log.jsonl", followers=followers), 1, 3)
    assert "3/3" in out.getvalue()
    assert "A loss 0.3333" in out.getvalue()


def test_what_is_no_terminal_stays_empty(tmp_path):
    out = io.StringIO()
    with following(console=Console(file=out)) as followers:
        run(Journal(tmp_path / "log.jsonl", followers=followers), 0, 2)
    assert out.getvalue() == ""


def test_lines_of_the_log_go_above_the_bar_and_their_stream_comes_back(tmp_path):
    out = io.StringIO()
    handler = logging.StreamHandler(sys.stderr)
    before = handler.stream
    logging.getLogger().addHandler(handler)
    try:
        with following(console=Console(file=out, force_terminal=True, width=120)) as followers:
            Journal(tmp_path / "log.jsonl", followers=followers).begin(0, 2)
            logging.getLogger("mmroute.test").warning("a look at held-out items")
        assert "a look at held-out items\n" in out.getvalue()
        assert handler.stream is before
    finally:
        logging.getLogger().removeHandler(handler)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_number_and_a_resumed_run_replaces_what_was_lost(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, total in ((0, 4), (2, 3)):  # killed at 4, saved at 2
        with following(tmp_path / "board", Console(file=io.StringIO())) as followers:
            assert [type(f) for f in followers] == [Board]
            run(Journal(tmp_path / "log.jsonl", followers=followers), done, total)
    found = EventAccumulator(str(tmp_path / "board")).Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "ramp/text", "vision/0", "vision/1", "look/maze/chain"}
    assert [(e.step, pytest.approx(e.value, rel=1e-6)) for e in found.Scalars("loss")] == [
        (1, 1.0),
        (2, 1 / 2),
        (3, 1 / 3),
    ]


def test_a_board_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra, match=r"--tensorboard needs tensorboard.*mmroute\[train\]"), following(tmp_path):
        pass
