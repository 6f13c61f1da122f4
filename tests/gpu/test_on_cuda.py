"""The engine's equalities on a CUDA device, in float32 and bfloat16; `make gpu` runs them.

In float32 fused kernels use fast exponentials and other orders of summation, so 5e-5 stands where a CPU needs 1e-5.
In bfloat16 rounding decides: a reference is computed in bfloat16 and, with the same weights, in float32, and what is
tested may be twice as far from the float32 result as the bfloat16 reference is.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import families
import pytest
import routing
import torch
from oracle import masked_forward
from rig import labels, relative
from rig import router as linear_router
from routing import Forced, nested, play, scattered
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available

import mmroute
from mmroute import backbones, cost, hub
from mmroute.engine import varlen
from mmroute.engine.attach import Routed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LAYERS = 4
DEVICE = "cuda"
RAGGED = (0, 3, 2)
MASKS = {"skip": scattered, "drop": nested}
NOT_WRITTEN = [families.IMAGE, families.IMAGE + 1]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": NOT_WRITTEN}
BEAMS = {**GREEDY, "num_beams": 3}
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
by_family = pytest.mark.parametrize("name", families.NAMES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def _plain_arithmetic() -> Iterator[None]:
    """Float32 is float32 in a tower's convolutions too, and only the tests of training ask for gradients."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.no_grad():
        yield


def moved(tensors: Any, dtype: torch.dtype) -> dict[str, Any]:
    """A batch on the device, its pixels in `dtype`."""
    return {k: v.to(DEVICE, dtype) if v.is_floating_point() else v.to(DEVICE) for k, v in tensors.items()}


def distance(a: Tensor, b: Tensor, where: Tensor | None = None) -> float:
    """Largest difference of logits; those that Chameleon forbids are the lowest number of their type."""
    return routing.distance(a.float().clamp(min=-1e4), b.float().clamp(min=-1e4), where)


@dataclass
class Pair:
    """A stock model in the type under test, and the model with the same weights in float32 that says what is true."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any]

    def __post_init__(self) -> None:
        self.model = families.make(self.name, layers=LAYERS, **self.options).to(DEVICE, self.dtype)
        self.pixels = self.dtype
        if self.name == "chameleon":  # its tower chooses among codes: rounded, it would see another image
            self.model.model.vqmodel.float()
            self.pixels = torch.float32
        self.exact = copy.deepcopy(self.model).float()
        self.family = backbones.of(self.model)

    def attach(self, prune: Any = None, **options: Any) -> Routed:
        """A routed twin of the model."""
        return mmroute.attach(copy.deepcopy(self.model), prune=prune, **options)

    def prompt(self, pads: Sequence[int] = RAGGED, **options: Any) -> dict[str, Any]:
        return moved(families.make_inputs(self.name, self.model, len(pads), list(pads), **options), self.pixels)

    def story(self, pads: Sequence[int] = RAGGED) -> routing.Story:
        """On the device, told with the type's pixels."""
        cpu = families.make(self.name, layers=1, **self.options)
        story = routing.tell(self.name, cpu, self.family, pads, observations=2, tail=2)
        story.whole = moved(story.whole, self.pixels)
        story.images = [moved(image, self.pixels) for image in story.images]
        return story

    def masked(self, batch: dict[str, Any], keep: Sequence[Tensor]) -> tuple[Tensor, float]:
        """What is true of a masked forward, and how far off a routed one may be."""
        exact = masked_forward(self.exact, self.family, moved(batch, torch.float32), keep)
        if self.dtype == torch.float32:
            return exact, 5e-5
        real = batch["attention_mask"].bool()
        ours = masked_forward(self.model, self.family, batch, keep)
        tolerance = 2 * distance(ours, exact, real)
        whole = masked_forward(self.exact, self.family, moved(batch, torch.float32), [real] * LAYERS)
        assert distance(whole, exact, real) > 2 * tolerance, "the tolerance would let no routing at all pass"
        return exact, tolerance


def pair(name: str, dtype: torch.dtype, **options: Any) -> Pair:
    return Pair(name, dtype, options)


def _on_device(masks: Sequence[Tensor]) -> list[Tensor]:
    return [mask.to(DEVICE) for mask in masks]


def _told_is_masked(on: Pair, story: routing.Story, action: str) -> Any:
    masks = _on_device(MASKS[action](_off_device(story), LAYERS))
    want, tolerance = on.masked(story.whole, masks)
    with on.attach(Forced(masks, action), prefix_tokens=0) as routed:
        told = play(routed.model, story, routed.new_cache())
    assert distance(told.all, want, story.real) <= tolerance
    assert told.cache.lengths() == [mask.sum(1).tolist() for mask in masks]
    return told.cache


def _off_device(story: routing.Story) -> routing.Story:
    whole = {name: tensor.cpu() for name, tensor in story.whole.items()}
    return routing.Story(whole, story.spans, story.images, story.hops)


@by_dtype
@by_family
@pytest.mark.parametrize("action", ["skip", "drop"])
def test_a_story_in_chunks_is_one_masked_forward_and_stores_what_it_counts(
    name: str, dtype: torch.dtype, action: str
) -> None:
    on = pair(name, dtype)
    cache = _told_is_masked(on, on.story(), action)
    _, K, _, E = cache.layers[0].keys.shape
    slots = sum(map(sum, cache.lengths()))
    assert cache.live_bytes() == slots * 2 * K * E * dtype.itemsize == cost.estimate_kv_bytes(cache.trace)
    assert cache.layers[0].keys.dtype == dtype
    assert cache.layers[0].keys.is_cuda == (DEVICE == "cuda")


@by_dtype
@by_family
def test_keeping_everything_is_stock(name: str, dtype: torch.dtype) -> None:
    on = pair(name, dtype)
    for pads in ((0,), (0, 0, 0), RAGGED):
        batch = on.prompt(pads)
        real = batch["attention_mask"].bool()
        stock = on.model(**batch).logits
        true = on.exact(**moved(batch, torch.float32)).logits
        tolerance = 5e-5 if dtype == torch.float32 else 2 * distance(stock, true, real)
        with on.attach(strip_padding=True) as routed:
            assert distance(routed.model(**batch).logits, true, real) <= tolerance
            out, beams = routed.generate(**batch, **GREEDY), routed.generate(**batch, **BEAMS)
        if dtype == torch.float32:  # in half precision near ties may go either way
            assert torch.equal(out, on.model.generate(**batch, **GREEDY))
            assert torch.equal(beams, on.model.generate(**batch, **BEAMS))
        assert out.shape == beams.shape == (len(pads), real.shape[1] + GREEDY["max_new_tokens"])


@by_family
def test_routed_tokens_and_beams_are_those_of_a_cpu(name: str) -> None:
    """Hashed scores choose the same positions on every device, and float32 writes the same tokens from them."""
    on = pair(name, torch.float32)
    batch = families.make_inputs(name, on.model, 3, list(RAGGED))
    prune = {"vision_keep": 0.4, "text_keep": 0.7, "start_layer": 1}
    written = []
    for device in ("cpu", DEVICE):
        model = copy.deepcopy(on.model).to(device)
        with mmroute.attach(model, prune=hub.load("prune", "random", **prune)) as routed:
            here = {key: value.to(device) for key, value in batch.items()}
            out = routed.generate(**here, **GREEDY, return_dict_in_generate=True)
            beams = routed.generate(**here, **BEAMS)
        written.append((out.sequences.tolist(), beams.tolist(), out.past_key_values.lengths()))
    assert written[0] == written[1]


@by_dtype
@by_family
def test_a_row_in_a_padded_batch_is_the_row_alone(name: str, dtype: torch.dtype) -> None:
    on = pair(name, dtype)
    batch = on.prompt()
    prune = hub.load("prune", "random", vision_keep=0.4, text_keep=0.7)
    with mmroute.attach(copy.deepcopy(on.exact), prune=prune) as routed:
        true = routed.model(**moved(batch, torch.float32)).logits
    with on.attach(prune) as routed:
        together = routed.model(**batch)
        for row, pad in enumerate(RAGGED):
            alone = routed.model(**families.slice_batch(batch, row))
            off = distance(alone.logits[0], true[row, pad:])
            tolerance = 5e-5 if dtype == torch.float32 else 2 * off
            assert distance(together.logits[row, pad:], true[row, pad:]) <= tolerance
            kept = [layer[row] for layer in together.past_key_values.lengths()]
            assert kept == [layer[0] for layer in alone.past_key_values.lengths()]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
@pytest.mark.parametrize("kernel", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"])
def test_every_kernel_of_torch_attends_alike(name: str, kernel: str) -> None:
    # As many key heads as query heads: the efficient kernel knows no grouped ones.
    on = pair(name, torch.bfloat16, num_key_value_heads=families.HEADS)
    pads = RAGGED
    if kernel == "FLASH_ATTENTION":  # it takes no mask, which single positions of unequal rows need
        pads = (0,)
        if not varlen._proven(torch.device(DEVICE, 0), torch.bfloat16, families.HEADS, families.HEADS, 16):
            pytest.skip("chunks behind a cache need torch's variable-length attention, which does not run here")
    story = on.story(pads)
    masks = _on_device(scattered(_off_device(story), LAYERS))
    want, tolerance = on.masked(story.whole, masks)
    with on.attach(Forced(masks), prefix_tokens=0) as routed, sdpa_kernel(getattr(SDPBackend, kernel)):
        told = play(routed.model, story, routed.new_cache())
    assert distance(told.all, want, story.real) <= tolerance


@pytest.mark.parametrize("kv_heads", [families.KV_HEADS, families.HEADS])
def test_rows_of_unequal_length_run_in_one_call(monkeypatch: pytest.MonkeyPatch, kv_heads: int) -> None:
    served = []
    attend = varlen.attend
    monkeypatch.setattr(varlen, "attend", lambda *args: served.append(args[3].packed) or attend(*args))
    on = pair("qwen2_5_vl", torch.bfloat16, num_key_value_heads=kv_heads)
    _told_is_masked(on, on.story(), "skip")
    assert True in served, "packed rows went one by one"
    served.clear()
    _told_is_masked(on, on.story((0,)), "skip")
    assert False in served, "a chunk behind a cache was masked"


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
@by_family
def test_a_model_loaded_with_flash_attention_routes_too(name: str) -> None:
    on = pair(name, torch.bfloat16)
    story = on.story()
    masks = _on_device(scattered(_off_device(story), LAYERS))
    want, tolerance = on.masked(story.whole, masks)
    on.family.text_model(on.model).config._attn_implementation_internal = "flash_attention_2"
    with on.attach(Forced(masks), prefix_tokens=0) as routed:
        told = play(routed.model, story, routed.new_cache())
    assert distance(told.all, want, story.real) <= tolerance


@by_family
def test_the_dense_executor_trains_what_the_physical_one_does(name: str) -> None:
    on = pair(name, torch.float32)
    batch = on.prompt()
    found = []
    with torch.enable_grad():
        for executor in ("dense", "physical"):
            routed = on.attach(linear_router(), executor=executor)
            routed.model.train()
            loss = routed.model(**batch, labels=labels(batch)).loss
            loss.backward()
            grads = {n: p.grad for n, p in routed.model.named_parameters() if p.grad is not None}
            found.append((loss.detach(), {n: g for n, g in grads.items() if not n.startswith("mmroute.")}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)
    assert relative(found[0][1], found[1][1]) < 1e-4


def test_the_vision_tower_and_the_cache_stay_on_their_device() -> None:
    on = pair("qwen2_5_vl", torch.float32)
    with on.attach(hub.load("prune", "random", vision_keep=0.4)) as routed:
        cache = routed.model(**on.prompt()).past_key_values
        cache.reorder_cache(torch.tensor([2, 0, 1], device=DEVICE))
        cache.crop(-1)
        twin = cache.fork()
    assert all(layer.keys.device.type == DEVICE == layer.pos.device.type for layer in twin.layers)
