"""Teacher forcing tells what rolling out would write; pictures after hops are in the session of both."""

import pytest

import mmroute
from mmroute.bench import answers, forced, items
from mmroute.cost import estimate_kv_bytes, estimate_kv_bytes_by_hop
from mmroute.errors import ConfigError
from mmroute.recipe import equip, read
from mmroute.tokens import Modality

METHODS = {
    "none": [],
    "random": ["prune.vision_keep=0.95"],
    "snapkv": ["prune.vision_keep=0.8"],
    "dare-lh": ["trained=null", "prune.scorer=random", "prune.vision_keep=0.65", "prune.text_keep=0.95"],
}


@pytest.fixture(scope="module")
def model():
    return mmroute.load("tiny")


def both(model, name, prompts, task):
    recipe = read(name, METHODS[name])
    with equip(model, recipe) as (routed, think):
        rolled = answers.answer_prompts(routed, think, recipe, task, prompts)
        return rolled, forced.force_chains(routed, think, task, prompts)


@pytest.fixture(scope="module")
def frozenlake():
    task = items.load_task("frozenlake")
    return task, items.Prompts(items.draw(task, items.Plan(task="frozenlake", n=8)), 8, keep_bytes=1 << 28)


@pytest.mark.parametrize("name", METHODS)
def test_a_chain_is_exact_where_it_is_rolled_out_word_for_word(model, frozenlake, name):
    task, prompts = frozenlake
    rolled, told = both(model, name, prompts, task)
    assert told.exact == rolled.exact
    assert all(answer >= exact for answer, exact in zip(told.answers, told.exact, strict=True))
    if name == "none":
        assert sum(told.exact) > 4  # the bundled model knows this task


def test_pictures_after_hops_stay_in_the_session_and_in_its_kv(model):
    task = items.load_task("frozenlake", {"hop_images": "observed"})
    prompts = items.Prompts(items.draw(task, items.Plan(task="frozenlake", n=4)), 4)
    rolled, told = both(model, "none", prompts, task)
    assert len(told.exact) == 4
    assert max(len(items.observations(sample)) for sample in prompts.samples) > 2
    for sample, answer in zip(prompts.samples, rolled.answers, strict=True):
        seen = [call for call in answer.trace.calls[1:] if call.kind == "prefill"]
        assert len(seen) <= len(items.observations(sample))
        whole = answer.trace.calls[0].new[0][Modality.VISION]
        assert all(call.new[0][Modality.VISION] == whole for call in seen)
        by_hop = estimate_kv_bytes_by_hop(answer.trace)
        assert by_hop == sorted(by_hop)
        assert by_hop[-1] == estimate_kv_bytes(answer.trace)
    assert any(call.kind == "prefill" for answer in rolled.answers for call in answer.trace.calls[1:])


def test_a_task_without_chains_has_no_exact_ones(model):
    assert forced.force_chains(None, None, object(), items.Prompts([], 1)) is None


def test_a_context_that_forgets_pictures_is_refused():
    plan = items.Plan(task="maze", n=1, context="markov2")
    with pytest.raises(ConfigError, match="context is 'accumulate', given 'markov2'"):
        items.draw(items.load_task("maze"), plan)
