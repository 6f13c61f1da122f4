"""What routing may cost: one device read per prompt, none per step, no square of the sequence, no copy of the cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import families
import pytest
import torch
from cases import LAYERS, Case, grid
from routing import Constant, Forced, Longest, play
from torch.utils._python_dispatch import TorchDispatchMode

from mmroute import hub
from mmroute.cache import Chunk
from mmroute.deepen.uniform import Uniform


@contextmanager
def counted_reads() -> Iterator[list[str]]:
    """Names of the Python calls that read a tensor's value, while the block runs."""
    names = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")
    seen: list[str] = []
    patch = pytest.MonkeyPatch()
    for name in names:
        original = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *args: object, name: str = name, original: object = original) -> object:
            seen.append(name)
            return original(self, *args)  # type: ignore[operator]

        patch.setattr(torch.Tensor, name, read)
    try:
        yield seen
    finally:
        patch.undo()


PRUNERS = {
    "skip": lambda: Longest(),
    "drop by attention": lambda: hub.load("prune", "fastv", vision_keep=0.4, start_layer=1),
    "forget": lambda: hub.load("prune", "knorm", vision_keep=0.4),
    "stages": lambda: hub.load("prune", "pyramiddrop"),
    "stages that all enter again": lambda: hub.load("prune", "reroute"),
    "forget by a window": lambda: hub.load("prune", "snapkv"),
    "drop by words and merge": lambda: hub.load("prune", "sparsevlm"),
    "drop what is alike": lambda: hub.load("prune", "divprune"),
    "drop what is like pivots": lambda: hub.load("prune", "dart"),
}


@grid(names=("llava",), attn=("sdpa",), rows=("three", "padded"))
@pytest.mark.parametrize("prune", PRUNERS)
def test_one_read_per_prompt_and_none_per_step(case: Case, prune: str) -> None:
    """At the text model, where routing is: the stock vision part reads as it likes."""
    story = case.story(observations=1, tail=2)
    with case.attached(PRUNERS[prune](), Uniform(deepen_tokens=2)) as routed:
        text, cache = routed.controller.text, routed.new_cache()
        reads = []
        for i in range(len(story.spans)):
            call = story.chunk(i)
            ids, mask = call["input_ids"], call["attention_mask"]
            embedded: list[dict] = []
            note = partial(_note, embedded)
            handle = text.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
            with routed.off():
                routed.model(**{**call, "attention_mask": mask[:, -ids.shape[1] :]})
            handle.remove()
            cache.next = Chunk(modality=routed.controller.table[ids])
            given = {**embedded[0], "past_key_values": cache, "attention_mask": mask}
            with counted_reads() as seen:
                text(**given)
            reads.append(list(seen))
    assert [len(r) for r in reads] == [1, 1, 0, 0]
    assert reads[0] == ["tolist"]


def _note(calls: list[dict], module: object, args: tuple, kwargs: dict) -> None:
    calls.append(dict(kwargs))


@grid(names=("llava",), attn=("sdpa",), rows=("padded",))
def test_one_read_per_hop_close_and_crop(case: Case) -> None:
    story = case.story(observations=1, tail=2)
    prune = Forced([story.real] * LAYERS, stays=[torch.arange(story.real.shape[1]).expand(3, -1) % 2 == 0] * LAYERS)
    with case.attached(prune) as routed:
        cache = play(routed.model, story, routed.new_cache()).cache
        with counted_reads() as seen:
            cache.close_hop(prune)
        assert seen == ["tolist"]
        assert cache.lengths() != [[int(n) for n in story.real.sum(1)]] * LAYERS
        with counted_reads() as seen:
            cache.reorder_cache(torch.tensor([2, 1, 0]))
        assert seen == ["tolist"]
        play(routed.model, story, cache := routed.new_cache(), chunks=range(2))
        with counted_reads() as seen:
            cache.crop(-3)
        assert seen == ["tolist"]


class _Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))  # type: ignore[operator]
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
        return out


@grid(attn=("sdpa",), rows=("one", "padded"))
@pytest.mark.parametrize("prune", ["longest", "fastv"])
def test_no_square_of_the_sequence_is_ever_made(case: Case, prune: str) -> None:
    pruner = Longest() if prune == "longest" else hub.load("prune", prune, vision_keep=0.4, start_layer=1)
    batch = families.make_inputs(case.name, case.model, len(case.pads), list(case.pads), images=0, after=1200)
    B, N = batch["input_ids"].shape
    with case.attached(pruner) as routed, _Largest() as seen:
        out = routed.model(**batch, logits_to_keep=1)
        routed.model(input_ids=torch.full((B, 1), 100), past_key_values=out.past_key_values)
    linear = B * N * 2 * families.HIDDEN  # the widest activation: two MLP halves of width 2 D would be this
    assert seen.numel <= 2 * linear < N * N


@grid(names=("llava",), attn=("sdpa",), rows=("one",))
def test_buffers_are_made_once_and_filled_in_place(case: Case) -> None:
    batch = case.prompt
    with case.attached(Constant()) as routed:
        options = {"max_new_tokens": 60, "do_sample": False, "suppress_tokens": [families.IMAGE]}
        cache = routed.new_cache()
        cache.reserve(batch["input_ids"].shape[1] + 60)
        routed.model(**batch, past_key_values=cache)
        where = [layer.keys.data_ptr() for layer in cache.layers]
        for _ in range(60):
            routed.model(input_ids=torch.full((1, 1), 100), past_key_values=cache)
        assert [layer.keys.data_ptr() for layer in cache.layers] == where
        grown = routed.generate(**batch, **options, return_dict_in_generate=True).past_key_values
    assert grown.lengths() == [[n - 1 for n in layer] for layer in cache.lengths()]
    most = max(map(max, grown.lengths()))
    _, K, slots, E = grown.layers[0].keys.shape
    assert slots < most + 64 + 16  # rounded up to a block; the prompt's pruned positions were reserved for too
    assert grown.allocated_bytes() == LAYERS * 2 * K * slots * E * 4
