"""Calls that would silently run unrouted or unmasked are refused with advice, and nothing is left half done."""

import copy
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from cases import LAYERS, Case
from routing import Constant, Forced, Longest, play, scattered
from transformers import DynamicCache, StaticCache

import mmroute
from mmroute import hub
from mmroute.cache import Chunk, RaggedCache
from mmroute.engine.layer import routed_forward
from mmroute.errors import ConfigError, UnsupportedBackbone, UnsupportedCall
from mmroute.prune.base import Site
from mmroute.tokens import Tokens

CASE = Case("qwen2_5_vl", "sdpa", "padded")


def _foreign(routed: Any) -> None:
    routed.model(**CASE.prompt, past_key_values=DynamicCache(config=routed.model.config))


def _static(routed: Any) -> None:
    cache = StaticCache(config=routed.model.config, max_cache_len=64)
    routed.generate(**CASE.prompt, past_key_values=cache, max_new_tokens=2)


def _implementation(routed: Any) -> None:
    routed.generate(**CASE.prompt, cache_implementation="static", max_new_tokens=2)


def _mask_4d(routed: Any) -> None:
    batch = CASE.prompt
    N = batch["input_ids"].shape[1]
    routed.model(**{**batch, "attention_mask": torch.ones(3, 1, N, N).tril()}, position_ids=torch.zeros(3, 3, N).long())


def _positional_mask(routed: Any) -> None:
    batch = CASE.prompt
    inside = routed.controller.text
    inside(batch["input_ids"], batch["attention_mask"])


def _short_mask(routed: Any) -> None:
    batch = CASE.prompt
    positions = CASE.family.positions(
        CASE.model, batch["input_ids"], batch["attention_mask"], batch.get("image_grid_thw")
    )
    routed.model(**{**batch, "attention_mask": batch["attention_mask"][:, 1:]}, position_ids=positions)


def _no_modality(routed: Any) -> None:
    routed.model.model(inputs_embeds=torch.zeros(1, 4, families.HIDDEN))


def _wrong_modality(routed: Any) -> None:
    routed.model.model(inputs_embeds=torch.zeros(1, 4, families.HIDDEN), modality=torch.zeros(1, 3).long())


def _wrong_chunk(routed: Any) -> None:
    cache = routed.new_cache()
    cache.next = Chunk(modality=torch.zeros(2, 4).long())
    routed.model.model(inputs_embeds=torch.zeros(1, 4, families.HIDDEN), past_key_values=cache)


def _other_batch(routed: Any) -> None:
    cache = routed.model(**CASE.prompt).past_key_values
    positions = torch.full((3, 2, 1), 32)
    routed.model(input_ids=torch.full((2, 1), 100), position_ids=positions, past_key_values=cache)


def _stock_write(routed: Any) -> None:
    cache = routed.model(**CASE.prompt).past_key_values
    cache.update(torch.zeros(3, 2, 1, 16), torch.zeros(3, 2, 1, 16), 0)


def _used_while_off(routed: Any) -> None:
    cache = routed.model(**CASE.prompt).past_key_values
    with routed.off() as model:
        model(input_ids=torch.full((3, 1), 100), past_key_values=cache)


def _crop_positive(routed: Any) -> None:
    routed.model(**CASE.prompt).past_key_values.crop(3)


def _crop_too_far(routed: Any) -> None:
    routed.model(**CASE.prompt).past_key_values.crop(-1000)


def _crop_behind_a_close(routed: Any) -> None:
    cache = routed.model(**CASE.prompt).past_key_values
    real = CASE.prompt["attention_mask"].bool()
    cache.close_hop(Forced([real] * LAYERS, stays=[torch.zeros_like(real)] * LAYERS))
    cache.crop(-1)


def _close_nothing(routed: Any) -> None:
    routed.new_cache().close_hop(Constant())


def _attach_twice(routed: Any) -> None:
    mmroute.attach(routed.model)


def _train_on_a_cache(routed: Any) -> None:
    cache = routed.model(**CASE.prompt).past_key_values
    routed.model.train()
    try:
        with torch.enable_grad():
            routed.model(input_ids=torch.full((3, 2), 100), past_key_values=cache)
    finally:
        routed.model.eval()


def _row_at_layer_0(routed: Any) -> None:
    class Early(Constant):
        needs = frozenset({"row"})

        def scores(self, x: torch.Tensor, tokens: Tokens, site: Site) -> torch.Tensor:
            return site.row

    before, routed.controller.pruner = routed.controller.pruner, Early()
    try:
        routed.model(**CASE.prompt)
    finally:
        routed.controller.pruner = before


def _positional(routed: Any) -> None:
    layer = routed.controller.text.layers[0]
    routed_forward(layer, torch.zeros(1, 1, 64), None, mmroute_step=object())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (_foreign, "past_key_values is a DynamicCache; .* routed.off"),
        (_static, "past_key_values is a StaticCache; pass none"),
        (_implementation, "cache_implementation='static' .* leave it out"),
        (_mask_4d, "attention_mask is a 4-D mask; routing takes the 2-D padding mask"),
        (_positional_mask, "takes everything but input_ids by keyword"),
        (_short_mask, "attention_mask has 31 columns, the call brings 32"),
        (_no_modality, "embeddings came without saying what they are"),
        (_wrong_modality, r"modality is \(1, 3\), the call brings \(1, 4\)"),
        (_wrong_chunk, r"modality is \(2, 4\), the call brings \(1, 4\)"),
        (_other_batch, "this cache holds 3 rows, the call brings 2"),
        (_stock_write, "a routed cache was written by a stock call"),
        (_used_while_off, "a routed cache cannot be used while routing is off"),
        (_crop_positive, "crop takes minus the number of columns to remove, given 3"),
        (_crop_too_far, "crop by -1000: the cache holds 32 columns"),
        (_crop_behind_a_close, r"crop to column 31: a hop was compressed at column 32 .* fork\(\)"),
        (_close_nothing, "the cache is empty; close a hop after"),
        (_attach_twice, "attached already; call routed.detach"),
        (_train_on_a_cache, "written in place, which cannot be differentiated; train on the whole sequence"),
        (_row_at_layer_0, "no attention row before layer 0"),
        (_positional, "takes everything but its hidden states as keywords"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_call_is_refused_with_advice(call: Callable[[Any], None], says: str) -> None:
    with CASE.attached(Longest()) as routed:
        with pytest.raises(UnsupportedCall, match=says):
            call(routed)
        out = routed.model(**CASE.prompt)  # and the model is none the worse
        assert torch.isfinite(out.logits[:, -1]).all()


@pytest.mark.parametrize("backend", ["flex_attention", "mmroute_sdpa"])
def test_backend_that_would_run_unmasked_is_refused(backend: str) -> None:
    model = copy.deepcopy(Case("llava", "sdpa", "one").model)
    model.config.text_config._attn_implementation_internal = backend
    with pytest.raises(UnsupportedCall, match=f"attention backend '{backend}' .*attn_implementation='sdpa'"):
        mmroute.attach(model)
    assert "forward" not in model.model.language_model.layers[0].__dict__


def test_sliding_window_is_refused() -> None:
    model = families.make("llava", layers=1, sliding_window=16)
    with pytest.raises(UnsupportedBackbone, match=r"sliding window of 16 .*sliding_window=None"):
        mmroute.attach(model)


def test_model_of_no_family_is_refused() -> None:
    with pytest.raises(UnsupportedBackbone, match=r"mistral.*qwen2_5_vl"):
        mmroute.attach(families.make("llava", layers=1).model.language_model)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefix_tokens": -1}, "prefix_tokens is a count of positions, given -1"),
        ({"executor": "fast"}, "executor is 'dense' or 'physical', given 'fast'"),
        ({"prune": "fastv"}, "prune takes a Pruner, given str"),
        ({"deepen": 3}, "deepen takes a Deepener, given int"),
    ],
)
def test_wrong_option_of_attach_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        mmroute.attach(CASE.model, **options)


def test_detaching_twice_says_there_is_nothing_to_detach() -> None:
    with pytest.raises(UnsupportedCall, match="not attached; nothing to detach"):
        mmroute.detach(CASE.model)


def test_failed_call_leaves_the_cache_as_it_was() -> None:
    story = CASE.story(observations=1, tail=2)
    masks = scattered(story, LAYERS)

    class Breaks(Forced):
        armed = False

        def keep(self, x: torch.Tensor, tokens: Tokens, site: Site) -> Any:
            if self.armed and site.layer == 3:
                raise RuntimeError("out of memory, say")
            return super().keep(x, tokens, site)

    prune = Breaks(masks)
    with CASE.attached(prune, hub.load("deepen", "uniform", deepen_tokens=2)) as routed:
        cache = routed.new_cache()
        want = play(routed.model, story, cache).all
        cache = routed.new_cache()
        play(routed.model, story, cache, chunks=range(1))
        cache.start_hop(1)
        before = cache.lengths(), cache.depth[0].lengths(), cache.seen, cache.live_bytes()
        prune.armed = True
        with pytest.raises(RuntimeError, match="out of memory"):
            play(routed.model, story, cache, chunks=range(1, 2))
        prune.armed = False
        assert (cache.lengths(), cache.depth[0].lengths(), cache.seen, cache.live_bytes()) == before
        again = play(routed.model, story, cache, chunks=range(1, 4)).all
    assert torch.equal(again, want[:, story.spans[1][0] :])


def test_cache_of_no_call_is_empty_and_can_be_reset() -> None:
    with CASE.attached(Longest()) as routed:
        cache = routed.new_cache()
        assert (cache.seen, cache.live_bytes(), cache.batch_size, cache.lengths()) == (0, 0, -1, [[]] * LAYERS)
        cache.crop(0)
        cache.reorder_cache(torch.tensor([0]))
        want = routed.model(**CASE.prompt, past_key_values=cache).logits
        cache.reset()
        assert isinstance(cache, RaggedCache)
        assert (cache.seen, cache.allocated_bytes()) == (0, 0)
        assert torch.equal(routed.model(**CASE.prompt, past_key_values=cache).logits, want)


# ---------------------------------------------------------------------- a model and its processor


def test_the_processor_of_another_model_is_named(tiny_folder: Callable) -> None:
    model, other = mmroute.load(tiny_folder("llava")), mmroute.load(tiny_folder("qwen2_5_vl")).processor
    with pytest.raises(ConfigError, match=r"whose image token '<\|image_pad\|>' is number .*the llava model waits for"):
        mmroute.attach(model, other)
    with pytest.raises(ConfigError, match="which does not read images; pass AutoProcessor"):
        mmroute.attach(model, model.processor.tokenizer)
    model.__dict__["processor"] = other  # one that was put there by hand
    with pytest.raises(ConfigError, match="pass the processor of the same checkpoint"):
        mmroute.attach(model)
    assert "_mmroute" not in model.__dict__


def test_a_model_on_several_devices_needs_somebody_who_moves_what_goes_between() -> None:
    model = families.make("llava", layers=3)
    model.model.language_model.layers[1].to("meta")
    with pytest.raises(UnsupportedCall, match=r"cpu \(layer 2\), meta \(layer 1\).*device_map=\"auto\""):
        mmroute.attach(model)


@pytest.mark.parametrize("backend", ["flex_attention", "paged|sdpa"])
def test_a_backend_that_would_run_unmasked_is_refused(backend: str) -> None:
    model = families.make("llava", layers=1)
    model.model.language_model.config._attn_implementation_internal = backend
    with pytest.raises(UnsupportedCall, match=r"would run without the routed mask; allowed: sdpa, eager"):
        mmroute.attach(model)
    assert "_mmroute" not in model.__dict__
