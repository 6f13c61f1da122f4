"""Every file in think/ keeps the thinker's contract; a new file is covered by being there."""

import pytest

from mmroute import hub
from mmroute.config import resolved
from mmroute.errors import ConfigError
from mmroute.think.base import Thinker

NAMES = hub.names("think")


@pytest.mark.parametrize("name", NAMES)
def test_a_way_to_think_says_how_to_ask_how_long_and_where_hops_begin(name):
    think = hub.load("think", name)
    assert isinstance(think, Thinker)
    assert think.style in ("cot", "direct", "latent", "image")
    assert think.cues
    assert all(cue.strip() == cue and cue for cue in think.cues)
    assert isinstance(think.max_new_tokens, int)
    assert think.max_new_tokens >= 1
    for piece in ("", " ", "word", "\n", "é", "�", "<|im_end|>", "s1"):
        assert isinstance(think.starts_hop(piece), bool)
        assert think.starts_hop(piece) == think.starts_hop(piece), "a token begins a hop or not, whatever was before"


@pytest.mark.parametrize("name", NAMES)
def test_its_config_makes_it_again_and_a_wrong_option_is_named(name):
    think = hub.load("think", name)
    assert hub.load("think", name, **resolved(think.config)).config == think.config
    with pytest.raises(ConfigError, match=rf"think\.{name}\.max_new_token: no such option"):
        hub.load("think", name, max_new_token=3)
    with pytest.raises(ConfigError, match=r"max_new_tokens: .*greater than or equal to 1 \(given 0\)"):
        hub.load("think", name, max_new_tokens=0)
