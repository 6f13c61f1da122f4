"""Stock `generate()` in all its modes runs on the routed cache: beams, several samples, drafts, chunks."""

import families
import pytest
import torch
from cases import LAYERS, Case, grid
from routing import Forced, Longest, distance, play, scattered

from mmroute import hub
from mmroute.deepen.uniform import Uniform

QUIET = {"suppress_tokens": [families.IMAGE, families.IMAGE + 1]}


def _pruner(name: str) -> object:
    return Longest() if name == "longest" else hub.load("prune", name, vision_keep=0.4)


@grid(rows=("one", "padded"), attn=("sdpa", "eager"))
def test_beams_equal_a_search_by_hand(case: Case) -> None:
    """The same search over full forwards without a cache: routed prompt, then positions that run everywhere."""
    batch, beams, steps = case.prompt, 3, 3
    B, N = batch["input_ids"].shape
    with case.attached(Longest()) as routed:
        out = routed.generate(**batch, max_new_tokens=steps, num_beams=beams, do_sample=False, **QUIET)
        best: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in range(B)]
        for step in range(steps):
            grown: list[list[tuple[float, list[int]]]] = [[] for _ in range(B)]
            for k in range(len(best[0])):
                said = torch.tensor([rows[k][1] for rows in best], dtype=torch.long).view(B, step)
                ids = torch.cat([batch["input_ids"], said], 1)
                call = {**batch, "input_ids": ids, "attention_mask": torch.cat([batch["attention_mask"], said >= 0], 1)}
                if "mm_token_type_ids" in call:
                    call["mm_token_type_ids"] = (ids == families.IMAGE).long()
                call["position_ids"] = case.family.positions(
                    case.model, ids, call["attention_mask"], batch.get("image_grid_thw")
                )
                generated = (torch.arange(N + step) >= N).expand(B, -1)
                logits = routed.model(**call, generated=generated, use_cache=False).logits[:, -1]
                logits[:, QUIET["suppress_tokens"]] = float("-inf")
                for row, scores in enumerate(logits.log_softmax(-1)):
                    value, said_ids = best[row][k]
                    top = scores.topk(2 * beams)
                    grown[row] += [
                        (value + s, [*said_ids, t])
                        for s, t in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                    ]
            best = [sorted(rows, reverse=True)[:beams] for rows in grown]
    assert out[:, N:].tolist() == [rows[0][1] for rows in best]


@grid(attn=("sdpa",), rows=("padded",))
def test_several_sequences_of_a_prompt_equal_prompts_written_several_times(case: Case) -> None:
    batch = case.prompt
    options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2, **QUIET}
    with case.attached(Longest()) as routed:
        torch.manual_seed(0)
        out = routed.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)
        for row in range(3):
            alone = routed.generate(
                **families.slice_batch(batch, row),
                max_new_tokens=1,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            for i in (2 * row, 2 * row + 1):
                assert distance(out.logits[0][i], alone.logits[0][0]) < 1e-5
    lengths = out.past_key_values.lengths()
    assert all(n[0::2] == n[1::2] for n in lengths)


@grid(attn=("sdpa",), rows=("one",))
@pytest.mark.parametrize("name", ["longest", "fastv"])
def test_drafts_looked_up_in_the_prompt_change_no_token(case: Case, name: str) -> None:
    batch = case.prompt
    ids = batch["input_ids"]
    ids[0, -6:] = torch.tensor([300, 301, 302, 300, 301, 302])  # repeats, so the very first call has drafts
    options = {"max_new_tokens": 12, "do_sample": False, **QUIET}
    with case.attached(_pruner(name), Uniform(deepen_tokens=3)) as routed:
        want = routed.generate(**batch, **options, return_dict_in_generate=True)
        out = routed.generate(**batch, **options, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
    calls = out.past_key_values.trace.calls
    assert sum(map(sum, calls[0].new)) > ids.shape[1]
    assert torch.equal(out.sequences, want.sequences)
    assert out.past_key_values.lengths() == want.past_key_values.lengths()
    assert out.past_key_values.depth[0].lengths() == want.past_key_values.depth[0].lengths()


@grid(attn=("sdpa",), rows=("one",))
def test_prompt_in_chunks_warns_and_routes_each_chunk(case: Case) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, **QUIET}
    batch = {k: v for k, v in case.prompt.items() if k in ("input_ids", "attention_mask")}
    batch["input_ids"] = torch.randint(100, 480, batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    with case.attached(Longest()) as routed:
        with pytest.warns(UserWarning, match="prefill_chunk_size=16"):
            out = routed.generate(**batch, **options, prefill_chunk_size=16, return_dict_in_generate=True)
        N = batch["input_ids"].shape[1]
        sizes = [16, N - 16] if N < 32 else [16, 16, N - 32]
        assert out.past_key_values.lengths()[0] == [sum(-(-n // 2) for n in sizes) + 2]
    with case.attached(strip_padding=True) as routed:
        whole = routed.generate(**batch, **options)
        assert torch.equal(routed.generate(**batch, **options, prefill_chunk_size=16), whole)


@grid(rows=("one", "padded"), attn=("sdpa",))
def test_cropping_what_was_added_changes_nothing(case: Case) -> None:
    story = case.story(observations=1, tail=4)
    masks = scattered(story, LAYERS)
    with case.attached(Forced(masks), Uniform(deepen_tokens=2), prefix_tokens=3) as routed:
        cache = routed.new_cache()
        play(routed.model, story, cache, chunks=range(2))
        in_hop, fork = cache.in_hop.clone(), cache.fork()
        before = [layer.lengths for layer in cache.layers], cache.meta["hop"].clone(), cache.live_bytes()
        want = play(routed.model, story, cache, chunks=range(2, 6)).all
        cache.crop(-4)
        assert cache.seen == fork.seen
        assert torch.equal(cache.in_hop, in_hop)
        assert ([layer.lengths for layer in cache.layers], cache.live_bytes()) == (before[0], before[2])
        assert torch.equal(cache.meta["hop"], before[1])
        for layer in (*cache.layers, *cache.depth[0].layers):
            if layer.keys is not None:
                free = layer.pos < 0
                assert not layer.keys.transpose(1, 2)[free].any()
        again = play(routed.model, story, cache, chunks=range(2, 6)).all
        forked = play(routed.model, story, fork, chunks=range(2, 6)).all
    assert torch.equal(again, want)
    assert torch.equal(forked, want)


@grid(rows=("padded",), attn=("sdpa",))
def test_rows_of_a_cache_move_select_and_repeat(case: Case) -> None:
    """Each row goes on as it would have gone on in its old place."""
    story = case.story(observations=1, tail=3)
    masks = scattered(story, LAYERS)
    order = torch.tensor([2, 0, 2, 1])
    moves = {
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])),
        "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
        "select bool": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
        "repeat": lambda cache: cache.batch_repeat_interleave(2),
        "reorder more": lambda cache: cache.reorder_cache(order),
    }
    rows = {
        "reorder": [2, 0, 1],
        "select": [2, 0],
        "select bool": [0, 2],
        "repeat": [0, 0, 1, 1, 2, 2],
        "reorder more": order.tolist(),
    }
    prune = Forced(masks)
    with case.attached(prune, Uniform(deepen_tokens=2)) as routed:
        start = routed.new_cache()
        play(routed.model, story, start, chunks=range(2))
        want = play(routed.model, story, start.fork(), chunks=range(2, 5)).all
        for name, move in moves.items():
            cache = start.fork()
            move(cache)
            assert cache.batch_size == len(rows[name])
            at = torch.tensor(rows[name])
            prune.masks = [mask[at] for mask in masks]
            out = []
            for i in range(2, 5):
                call = story.chunk(i)
                call = {k: v.index_select(1 if v.ndim == 3 else 0, at) for k, v in call.items()}
                out.append(routed.model(**call, past_key_values=cache).logits)
            assert distance(torch.cat(out, 1), want[at]) < 1e-5, name
            assert cache.meta["modality"].shape == (len(at), cache.seen)


@grid(names=("chameleon",))
def test_unlocked_images_are_written_and_detaching_locks_them(case: Case) -> None:
    batch = case.prompt
    with case.attached(Longest()) as routed:
        locked = routed.model(**batch).logits
        routed.family.unlock_images(routed.model)
        out = routed.model(**batch, output_hidden_states=True)
        assert torch.equal(out.logits, routed.model.lm_head(out.hidden_states[-1]))
        codes = routed.family.image_tokens(routed.model)
        assert (locked[..., codes] == torch.finfo(locked.dtype).min).all()
        words = torch.ones(locked.shape[-1], dtype=torch.bool)
        words[codes] = False
        assert torch.equal(out.logits[..., words], locked[..., words])
        table = routed.controller.table
        assert table[families.IMAGE] == 1
        assert (table[codes] == 1).all()
        assert int(table.sum()) == len(codes) + 1
        model = routed.model
    assert (model(**batch).logits[..., codes] == torch.finfo(locked.dtype).min).all()
