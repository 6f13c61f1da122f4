"""The README's Python runs as it stands."""

import re
from pathlib import Path

from conversations import picture

import mmroute
from mmroute.backbones.images import prepare, user_message

BLOCKS = re.findall(r"^```python\n(.*?)^```", (Path(__file__).parents[2] / "README.md").read_text("utf-8"), re.S | re.M)


def test_the_first_lines_answer_a_maze_and_leave_the_stock_model(capsys):
    names = {}
    exec(BLOCKS[0], names)
    said = capsys.readouterr().out
    assert "answer:" in said
    assert "vision" in said
    assert names["answer"].finished
    assert "_mmroute" not in names["model"].__dict__


def test_a_model_of_ones_own_generates_as_before(loaded):
    model = loaded("qwen2_5_vl")
    inputs = {**prepare(model, model.processor, user_message("where?", [picture()])), "max_new_tokens": 2}
    names = {"mmroute": mmroute, "my_model": model, "my_processor": model.processor, "inputs": inputs}
    try:
        exec(BLOCKS[1], names)
        assert [call.kind for call in names["routed"].trace.calls] == ["prefill", "decode"]
    finally:
        mmroute.detach(model)
