"""No thoughts: nothing that is written begins a hop."""

from mmroute.think.direct import Direct


def test_nothing_begins_a_hop_and_the_answer_is_short():
    think = Direct()
    assert not any(think.starts_hop(piece) for piece in ("s1", "\n", "answer:"))
    assert think.max_new_tokens == 16
    assert Direct(max_new_tokens=3).max_new_tokens == 3
