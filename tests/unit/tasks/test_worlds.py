"""The generated worlds: reproducible items, disjoint splits, exact simulators, pictures that say what the words say."""

import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmroute import hub
from mmroute.errors import ConfigError, InputError
from mmroute.tasks import _skins
from mmroute.tasks._grid import canonical, layout_hash, split_of
from mmroute.tasks._presets import PRESETS, level_of
from mmroute.tasks._solver import solve
from mmroute.tasks._texts import COLOURS, IMAGE, SHAPES, SPECIAL, VOCABULARY, position
from mmroute.tasks.base import Generated, Spec, State, group_accuracy, messages_so_far, relevant_tokens

WORLDS = ("maze", "frozenlake", "arrows", "gridspatial")
GOLDEN = Path(__file__).parents[2] / "golden" / "specs.json"
WITHOUT = {
    ("arrows", "mvot"),
    ("arrows", "mvot-xl"),
    ("gridspatial", "mvot"),
    ("gridspatial", "mvot-xl"),
    ("gridspatial", "ood-hops"),
}


def existing(presets):
    """Every (world, preset) that there is."""
    return [(name, preset) for name in WORLDS for preset in presets if (name, preset) not in WITHOUT]


def specs(task: Generated, split: str, n: int, offset: int = 0) -> list[Spec]:
    return [task.spec(split, offset + i) for i in range(n)]


def digest(task: Generated) -> str:
    """SHA-256 of the first 16 specs of every split."""
    lines = [s.to_json() for split in ("train", "val", "test") for s in specs(task, split, 16)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ---------------------------------------------------------------- 1: reproducible


@pytest.mark.parametrize("name", WORLDS)
def test_first_specs_of_every_preset_are_the_golden_ones(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    for preset in PRESETS:
        if (name, preset) not in WITHOUT:
            assert digest(hub.load("tasks", name, preset=preset)) == golden[f"{name}:{preset}"], preset


@pytest.mark.parametrize("name", WORLDS)
def test_a_spec_is_the_same_alone_and_in_a_run(name: str) -> None:
    in_a_run = specs(hub.load("tasks", name), "val", 10)
    alone = [hub.load("tasks", name).spec("val", i) for i in (9, 3, 0)]
    assert [in_a_run[i].to_json() for i in (9, 3, 0)] == [s.to_json() for s in alone]
    assert len({s.to_json() for s in in_a_run}) == 10


def test_specs_do_not_depend_on_hash_randomisation() -> None:
    code = (
        "from mmroute import hub; import hashlib;"
        "print([hashlib.sha256(hub.load('tasks', t).spec(s, 5).to_json().encode()).hexdigest()"
        f" for t in {WORLDS} for s in ('train', 'val', 'test')])"
    )
    out = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert out[0] == out[1] != b""


@pytest.mark.parametrize("name", WORLDS)
def test_seeds_splits_and_presets_give_other_items(name: str) -> None:
    first = {
        hub.load("tasks", name, **given).spec(split, 0).to_json()
        for given in ({}, {"seed": 1}, {"preset": "wide"})
        for split in ("train", "val", "test")
    }
    assert len(first) == 9


@pytest.mark.parametrize("name", WORLDS)
def test_a_spec_survives_json_and_a_task_survives_pickling(name: str) -> None:
    task = hub.load("tasks", name)
    spec = task.spec("test", 3)
    assert Spec.from_dict(json.loads(spec.to_json())) == spec
    assert pickle.loads(pickle.dumps(task)).spec("test", 3) == spec
    with pytest.raises(InputError, match="not a spec"):
        Spec.from_dict({"offset": [0, 0], "fog": [], "task": "maze"})


# ---------------------------------------------------------------- 2: splits


@pytest.mark.parametrize("name", WORLDS)
def test_every_layout_hashes_into_its_split_and_no_layout_is_in_two(name: str) -> None:
    task = hub.load("tasks", name)
    seen = {split: {s.layout_hash for s in specs(task, split, 200)} for split in ("train", "val", "test")}
    for split, hashes in seen.items():
        assert {split_of(h) for h in hashes} == {split}
    rng = np.random.default_rng(0)
    streamed = {split_of(task.stream(rng, n, 2).layout_hash) for n in task.sizes for _ in range(50)}
    assert streamed == {"train"}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_twenty_thousand_items_share_no_layout_between_splits(name: str) -> None:
    task = hub.load("tasks", name)
    seen = [{s.layout_hash for s in specs(task, split, 20_000)} for split in ("train", "val", "test")]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


@pytest.mark.parametrize("name", ["maze", "frozenlake", "gridspatial"])
def test_a_quad_lies_in_one_split_and_shares_two_layouts(name: str) -> None:
    task = hub.load("tasks", name)
    for unit in range(6):
        quad = specs(task, "test", 4, 4 * unit)
        assert len({s.group for s in quad}) == 1
        assert {split_of(s.layout_hash) for s in quad} == {"test"}
        # a mirrored board is the same layout
        assert len({s.layout_hash for s in quad}) == (1 if name == "gridspatial" else 2)


def test_the_eight_symmetries_of_a_board_have_one_hash() -> None:
    rng = np.random.default_rng(0)
    board = rng.integers(0, 4, (5, 5))
    keys = {layout_hash("x", 5, canonical(b)) for k in range(4) for b in (np.rot90(board, k), np.rot90(board.T, k))}
    assert len(keys) == 1
    assert layout_hash("x", 5, canonical(board + 1)) not in keys


def test_a_turned_maze_or_arrow_board_turns_its_directions() -> None:
    from mmroute.tasks import arrows, maze
    from mmroute.tasks._grid import spanning_tree

    rng = np.random.default_rng(0)
    walls = np.array(spanning_tree(rng, 4))
    turned = np.rot90(((walls << 1) | (walls >> 3)) & 15)  # up becomes left: bit a moves to a + 1
    assert maze._key("edges", walls.tolist()) == maze._key("edges", turned.tolist())
    assert maze._key("edges", walls.tolist()) != maze._key("edges", np.rot90(walls).tolist())
    ways, colours = rng.integers(4, size=(4, 4)), rng.integers(6, size=(4, 4))
    turned_key = arrows._key(np.rot90((ways + 1) % 4).tolist(), np.rot90(colours))
    assert arrows._key(ways.tolist(), colours) == turned_key
    assert arrows._key(ways.tolist(), colours) != arrows._key(np.rot90(ways).tolist(), np.rot90(colours))


@pytest.mark.parametrize("name", ["maze", "frozenlake"])
def test_no_two_held_out_items_ask_the_same_of_the_same_board(name: str) -> None:
    made = specs(hub.load("tasks", name), "test", 400)
    assert len({json.dumps(s.world, sort_keys=True) for s in made}) == 400


# ---------------------------------------------------------------- 3: simulators and pictures


@pytest.mark.parametrize(("name", "preset"), existing(["nano", "tiny", "small", "wide", "ood-size", "ood-hops"]))
def test_a_solver_that_reads_tiles_agrees_with_the_simulator(name: str, preset: str) -> None:
    task = hub.load("tasks", name, preset=preset)
    made = [*specs(task, "train", 60), *specs(task, "test", 40)]
    right = [solve(name, task.question_words(s), task.codes(s)) == task._answer_word(s) for s in made]
    assert all(right)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_decoding_a_drawn_state_gives_the_state(name: str, noise: float) -> None:
    task = hub.load("tasks", name, noise=noise)
    for spec in specs(task, "val", 4):
        for state in task.trace(spec):
            assert task.decode(task.draw(spec, state), spec) == state


def test_the_lake_agrees_with_gymnasium_step_by_step() -> None:
    toy_text = pytest.importorskip("gymnasium.envs.toy_text")
    task = hub.load("tasks", "frozenlake", variant="mvot")
    to_gym = {0: 3, 1: 0, 2: 1, 3: 2}
    for spec in specs(task, "train", 60):
        w = spec.world
        desc = [["H" if x else "F" for x in row] for row in w["grid"]]
        desc[w["start"][0]][w["start"][1]], desc[w["goal"][0]][w["goal"][1]] = "S", "G"
        env = toy_text.FrozenLakeEnv(desc=["".join(r) for r in desc], is_slippery=False)
        env.reset(seed=0)
        trace = task.trace(spec)
        for state, action in zip(trace[1:], w["actions"], strict=False):
            where, _, ended, _, _ = env.step(to_gym[action])
            assert divmod(int(where), spec.n) == state.cell
        assert ended == (spec.answer != 2)


def test_a_move_off_the_lake_stays_and_a_blocked_maze_move_stays() -> None:
    from mmroute.tasks import frozenlake, maze

    grid = [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert frozenlake.run(grid, (0, 0), (2, 2), [0, 1, 3, 2]) == [(0, 0), (0, 0), (0, 0), (0, 1), (1, 1)]
    world = {"walls": "tiles", "board": grid}
    assert maze.run(world, (0, 1), [2, 0, 3, 2]) == [(0, 1), (0, 1), (0, 1), (0, 2), (1, 2)]


def test_a_lake_run_stops_at_the_goal_and_later_moves_are_not_executed() -> None:
    task = hub.load("tasks", "frozenlake")
    extra = [len(s.world["actions"]) - len(task.trace(s)) + 1 for s in specs(task, "test", 200) if s.answer == 0]
    assert set(extra) == {0, 1, 2, 3}  # lists of h .. h + 2 moves, decided at h - 1 .. h + 1


# ---------------------------------------------------------------- 4: tiles


@pytest.mark.parametrize("name", WORLDS)
def test_a_picture_is_exactly_atlas_tiles(name: str) -> None:
    task = hub.load("tasks", name)
    spec = task.spec("val", 1)
    tiles = _skins.encode(task.draw(spec), 28)
    atlas = _skins.atlas(28)
    codes = task.codes(spec)
    assert codes.dtype == np.int16
    assert codes.shape == (10, 10) == tiles.shape[:2]
    for r, c in np.ndindex(codes.shape):
        assert any(np.array_equal(tiles[r, c], atlas[codes[r, c], v]) for v in range(_skins.VARIANTS))


@pytest.mark.parametrize("px", [14, 16, 28, 32])
def test_all_codes_are_read_back_at_the_strongest_noise(px: int) -> None:
    codes = np.arange(256) % _skins.NUM_CODES
    picture = _skins.picture(codes.reshape(16, 16), 7, px, 0.05)
    assert np.array_equal(_skins.read(picture, px).reshape(-1), codes)


@pytest.mark.parametrize("name", WORLDS)
def test_background_tiles_never_depend_on_the_board(name: str) -> None:
    task = hub.load("tasks", name)
    for spec in specs(task, "val", 4):
        outside = np.ones((10, 10), dtype=bool)
        outside.reshape(-1)[task.board(spec)] = False
        background = _skins.background(spec.seed, 10)
        assert np.array_equal(task.codes(spec)[outside], background[outside])
        assert (task.codes(spec)[~outside] >= _skins.LAKE).all()
        assert outside.sum() == 100 - spec.n**2


def test_the_small_preset_has_a_hundred_vision_tokens() -> None:
    task = hub.load("tasks", "maze")
    assert task.words(task.spec("val", 0), "cot").prompt.count(IMAGE) == 100
    assert task.draw(task.spec("val", 0)).size == (280, 280)


# ---------------------------------------------------------------- 5: relevance


@pytest.mark.parametrize("name", WORLDS)
def test_the_relevant_tiles_suffice_and_each_kind_of_them_is_needed(name: str) -> None:
    task = hub.load("tasks", name)
    broken = 0
    for spec in specs(task, "test", 40):
        codes, question, word = task.codes(spec), task.question_words(spec), task._answer_word(spec)
        hops = range(len(task.trace(spec)) + 1)
        needed = sorted({tile for hop in hops for tile in task.relevant(spec, hop)})
        assert set(needed) <= set(task.board(spec))
        fogged = np.full_like(codes, _skins.FOG)
        fogged.reshape(-1)[needed] = codes.reshape(-1)[needed]
        assert solve(name, question, fogged) == word
        for tile in needed:
            fogged = codes.copy()
            fogged.reshape(-1)[tile] = _skins.FOG
            broken += solve(name, question, fogged) != word
    assert broken >= 40


@pytest.mark.parametrize("name", WORLDS)
def test_relevant_tokens_follow_the_tiles_to_other_patch_grids(name: str) -> None:
    task = hub.load("tasks", name)
    spec = task.spec("test", 2)
    sample = task.sample(spec)
    same = relevant_tokens(sample, (1, 20, 20), 2)
    assert np.flatnonzero(same.board).tolist() == sorted(task.board(spec))
    assert same.hops[1] == task.relevant(spec, 1)
    assert same.needed.sum() < same.board.sum() < 100
    finer = relevant_tokens(sample, (1, 40, 40), 2)
    assert finer.needed.sum() == 4 * same.needed.sum()
    coarser = relevant_tokens(sample, (1, 10, 10), 2)  # 25 tokens, each of four tiles
    blocks = {(t // 10 // 2) * 5 + t % 10 // 2 for t in np.flatnonzero(same.needed).tolist()}
    assert set(np.flatnonzero(coarser.needed).tolist()) == blocks


def test_a_sample_without_tiles_has_no_relevant_tokens() -> None:
    sample = hub.load("tasks", "maze").sample(hub.load("tasks", "maze").spec("val", 0))
    with pytest.raises(InputError, match="tiles skin"):
        relevant_tokens(dataclasses.replace(sample, meta={"canvas": []}), (1, 20, 20), 2)


# ---------------------------------------------------------------- 7: unsolvable items


@pytest.mark.parametrize("name", WORLDS)
def test_fogged_items_cannot_be_solved_from_what_is_visible(name: str) -> None:
    task = hub.load("tasks", name, solvable="none")
    made = specs(task, "test", 240)
    assert all(solve(name, task.question_words(s), task.codes(s)) is None for s in made)
    assert not any(s.fog for s in specs(task, "train", 20))
    # what stays visible is shared by items with different answers, so the labels must be even
    for num in {len(task.choices(s)) for s in made}:
        counts = np.bincount([s.answer for s in made if len(task.choices(s)) == num], minlength=num)
        assert (np.abs(counts - counts.sum() / num) <= 4 * np.sqrt(counts.sum() / num)).all()
    assert {task.sample(s).difficulty["solvable"] for s in made[:3]} == {False}


def test_the_gate_mix_holds_other_sizes_and_fogged_items() -> None:
    made = specs(hub.load("tasks", "maze", preset="gate-mix"), "test", 480)
    fogged = np.mean([bool(s.fog) for s in made])
    large = np.mean([s.n > 6 for s in made])
    assert 0.02 < fogged < 0.16
    assert 0.02 < large < 0.2


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(("name", "preset"), existing(["small", "tiny", "nano", "wide", "ood-hops"]))
def test_every_word_is_in_the_vocabulary(name: str, preset: str) -> None:
    task, known = hub.load("tasks", name, preset=preset), set(VOCABULARY)
    for spec in [*specs(task, "train", 20), *specs(task, "test", 20)]:
        for mode in ("cot", "direct", "probe"):
            words = task.words(spec, mode)
            assert set(words.prompt + words.response) <= known
            assert len(words.supervised) == len(words.response)


def test_the_vocabulary_has_384_distinct_words_and_qwens_names_first() -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 384
    assert tuple(VOCABULARY[: len(SPECIAL)]) == SPECIAL
    assert "<|image_pad|>" in SPECIAL
    # the order is part of trained checkpoints
    assert hashlib.sha256(" ".join(VOCABULARY).encode()).hexdigest()[:16] == "6a12f992f45fe80d"


def test_a_lake_chain_reads_as_the_specification_says() -> None:
    world = {"grid": [[0, 1, 0]] * 3, "start": [1, 0], "goal": [2, 2], "actions": [0, 3]}
    spec = Spec("frozenlake", 1, "small", "train", 0, 3, 4, (0, 1), 5, world, 1, "")
    task = hub.load("tasks", "frozenlake")
    words = task.words(spec, "cot")
    assert " ".join(w for w in words.prompt if w != IMAGE) == (
        "<|im_start|> task: frozenlake <|vision_start|> <|vision_end|> actions: s1 up s2 right cot:"
    )
    assert " ".join(words.response) == "start r1c1 . s1 up r0c1 ice s2 right r0c2 hole answer: hole_fall <|im_end|>"
    assert all(words.supervised)


def test_a_blocked_maze_move_writes_the_wall_and_then_where_the_agent_stays() -> None:
    plates = [[0, 0], [0, 2], [2, 0], [2, 2]]
    board = [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    world = {"walls": "tiles", "board": board, "start": [1, 1], "plates": plates, "actions": [3, 0, 1]}
    spec = Spec("maze", 1, "small", "train", 0, 3, 4, (1, 0), 5, world, 0, "")
    words = hub.load("tasks", "maze").words(spec, "cot").response
    assert " ".join(words) == (
        "start r2c1 . s1 right r2c2 wall r2c1 s2 up r1c1 free s3 left r1c0 A answer: A <|im_end|>"
    )


@pytest.mark.parametrize("name", WORLDS)
def test_probes_ask_what_the_tiles_show_and_supervise_answers_only(name: str) -> None:
    task = hub.load("tasks", name)
    for spec in specs(task, "train", 20):
        words = task.words(spec, "probe")
        response = words.response[:-1]
        asked = [
            position(w)
            for w, s in zip(response, words.supervised, strict=False)
            if w[0] == "r" and w[1].isdigit() and not s
        ]
        assert 0 < len(asked) <= 14
        for i, (word, on) in enumerate(zip(response, words.supervised, strict=False)):
            if on or word == "." or not (word[0] == "r" and word[1].isdigit()):
                continue
            cell = (position(word)[0] - spec.offset[0], position(word)[1] - spec.offset[1])
            seen = task._seen(spec, cell)
            assert response[i + 1 : i + 1 + len(seen)] == seen
            assert all(words.supervised[i + 1 : i + 1 + len(seen)])


@pytest.mark.parametrize("order", ["image_first", "question_first"])
@pytest.mark.parametrize("name", WORLDS)
def test_messages_printed_in_order_are_the_words(name: str, order: str) -> None:
    task = hub.load("tasks", name, prompt_order=order)
    spec = task.spec("val", 3)
    for mode in ("cot", "direct", "probe"):
        (message,) = task.messages(task.sample(spec), mode)
        printed = ["<|im_start|>"]
        for block in message["content"]:
            is_image = block["type"] == "image"
            printed += ["<|vision_start|>", *[IMAGE] * 100, "<|vision_end|>"] if is_image else block["text"].split()
        assert printed == task.words(spec, mode).prompt


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("text", ["cot", "sentence", "action"])
def test_the_hops_of_a_sample_are_the_chain(name: str, text: str) -> None:
    task = hub.load("tasks", name, hop_text=text)
    for spec in specs(task, "val", 5):
        sample = task.sample(spec)
        assert len(sample.hops) == len(task.trace(spec)) - 1
        assert sample.answer == sample.choices[sample.answer_index].label
        if text == "cot":
            written = " ".join([h.text for h in sample.hops] + [sample.answer_text])
            assert written.split() == task.words(spec, "cot").response[:-1]
        else:
            assert all(h.text.endswith(".") for h in sample.hops)
        json.dumps(sample.meta)


@pytest.mark.parametrize("name", WORLDS)
def test_the_right_completion_scores_and_others_do_not(name: str) -> None:
    task = hub.load("tasks", name)
    for spec in specs(task, "val", 8):
        sample = task.sample(spec)
        words = " ".join(task.words(spec, "cot").response[:-1])
        assert task.score(sample, words).correct == 1
        assert task.score(sample, f"The answer is {sample.answer}.").correct == 1
        wrong = sample.choices[(sample.answer_index + 1) % len(sample.choices)].label
        assert task.score(sample, f"answer: {wrong}").correct == 0
        assert not task.score(sample, "I do not know").parsed
    with pytest.raises(ConfigError, match="strict"):
        task.score(sample, words, scorer="kind")


@pytest.mark.parametrize("name", WORLDS)
def test_observed_hops_show_the_state_and_contexts_keep_what_they_say(name: str) -> None:
    task = hub.load("tasks", name, hop_images="observed")
    spec = next(s for s in specs(task, "val", 40) if len(task.trace(s)) >= 3)
    sample, trace = task.sample(spec), task.trace(spec)
    assert [h.image for h in sample.hops] == list(range(1, len(trace)))
    for hop, state in zip(sample.hops, trace[1:], strict=True):
        assert task.decode(sample.images[hop.image], spec) == state

    def pictures(context: str, hop: int) -> list[object]:
        chat = messages_so_far(task, sample, hop, context)  # type: ignore[arg-type]
        return [b["image"] for m in chat for b in m["content"] if b["type"] == "image"]

    assert pictures("accumulate", 2) == sample.images[:3]
    assert pictures("markov2", 2) == [sample.images[0], sample.images[2]]
    assert pictures("markov2", 0) == [sample.images[0]]
    texts = [b["text"] for b in messages_so_far(task, sample, 2, "markov2")[1]["content"] if b["type"] == "text"]
    assert texts == [h.text for h in sample.hops[:2]]
    with pytest.raises(ConfigError, match="hops"):
        messages_so_far(task, sample, len(trace), "accumulate")


def test_gridspatial_hops_are_boxes_of_the_objects() -> None:
    task = hub.load("tasks", "gridspatial")
    spec = task.spec("val", 0)
    hop = task.sample(spec).hops[0]
    left, top, right, bottom = hop.boxes[0]
    tile = hop.relevant[0]
    assert (round(top * 10), round(left * 10)) == divmod(tile, 10)
    assert right - left == pytest.approx(0.1)
    assert bottom - top == pytest.approx(0.1)
    assert hop.box_image == 0


# ---------------------------------------------------------------- rules of single worlds


def test_maze_quads_have_two_boards_two_permuted_lists_and_four_ends() -> None:
    task = hub.load("tasks", "maze")
    for unit in range(30):
        quad = specs(task, "val", 4, 4 * unit)
        assert sorted(s.answer for s in quad) == [0, 1, 2, 3]
        assert len({json.dumps(s.world["board"]) for s in quad}) == 2
        lists = {tuple(s.world["actions"]) for s in quad}
        assert len(lists) == 2
        assert len({tuple(sorted(x)) for x in lists}) == 1
        assert len({json.dumps(s.world["plates"]) for s in quad}) == 1
        for s in quad:
            assert s.world["start"] not in s.world["plates"]
            assert s.n >= 4
            assert sum(x.event == "wall" for x in task.trace(s)) <= len(s.world["actions"]) // 2 + 1
            same_board = [x for x in quad if x.world["board"] == s.world["board"]]
            assert len({(x.seed, x.offset) for x in same_board}) == 1  # they share their picture


def test_lake_quads_swap_their_two_classes() -> None:
    task = hub.load("tasks", "frozenlake")
    pairs = []
    for unit in range(24):
        quad = specs(task, "val", 4, 4 * unit)
        table: dict[str, dict[str, int]] = {}
        for s in quad:
            table.setdefault(json.dumps(s.world["grid"]) + json.dumps(s.world["goal"]), {})[
                json.dumps(s.world["actions"])
            ] = s.answer
        (first, second) = table.values()
        assert set(first) == set(second)
        assert len(set(first.values())) == 2
        assert all(first[k] != second[k] for k in first)
        pairs.append(frozenset(first.values()))
    assert {p: pairs.count(p) for p in pairs} == dict.fromkeys(
        (frozenset((0, 1)), frozenset((0, 2)), frozenset((1, 2))), 8
    )


@pytest.mark.parametrize("name", ["maze", "frozenlake"])
def test_no_listed_move_that_is_executed_points_off_the_board(name: str) -> None:
    task = hub.load("tasks", name)
    for spec in [*specs(task, "train", 100), *specs(task, "test", 100)]:
        for state, action in zip(task.trace(spec)[:-1], spec.world["actions"], strict=False):
            row, col = state.cell
            down, right = ((-1, 0), (0, -1), (1, 0), (0, 1))[action]
            assert 0 <= row + down < spec.n
            assert 0 <= col + right < spec.n


def test_arrow_chains_never_cross_and_carry_each_colour_once() -> None:
    task = hub.load("tasks", "arrows")
    ks = []
    for spec in specs(task, "test", 300):
        w = spec.world
        cell, chain = tuple(w["start"]), []
        for _ in range(6):
            down, right = ((-1, 0), (0, -1), (1, 0), (0, 1))[w["arrows"][cell[0]][cell[1]]]
            cell = (cell[0] + down, cell[1] + right)
            chain.append(cell)
        assert len({*chain, tuple(w["start"])}) == 7
        assert sorted(w["colours"][r][c] for r, c in chain) == list(range(6))
        ks.append(w["k"])
    assert np.abs(np.bincount(ks, minlength=7)[1:] - 50).max() < 28  # 4 sigma


def test_gridspatial_quads_mirror_the_board_and_invert_the_relation() -> None:
    task = hub.load("tasks", "gridspatial")
    kinds = set()
    for unit in range(40):
        quad = specs(task, "val", 4, 4 * unit)
        kinds.add(quad[0].world["relation"])
        if len(task.choices(quad[0])) == 4:
            assert sorted(s.answer for s in quad) == [0, 1, 2, 3]
            continue
        by_relation: dict[str, list[int]] = {}
        for s in quad:
            by_relation.setdefault(s.world["relation"], []).append(s.answer)
        assert len(by_relation) == 2
        assert all(sorted(x) == [0, 1] for x in by_relation.values())
    assert kinds >= {"nearest", "between"}


def test_gridspatial_distractors_share_a_colour_or_a_shape() -> None:
    for spec in specs(hub.load("tasks", "gridspatial"), "train", 100):
        kinds = [(c, s) for c, s, _, _ in spec.world["objects"]]
        assert len(set(kinds)) == len(kinds)
        assert all(c < len(COLOURS) and s < len(SHAPES) for c, s in kinds)
        assert all(any(a != b and (a[0] == b[0] or a[1] == b[1]) for b in kinds) for a in kinds)


def test_classes_of_the_lake_stream_are_even_at_every_length() -> None:
    task, rng = hub.load("tasks", "frozenlake"), np.random.default_rng(0)
    for n, length in ((3, 1), (4, 4), (6, 12)):
        counts = np.bincount([task.stream(rng, n, length).answer for _ in range(600)], minlength=3)
        assert np.abs(counts - 200).max() < 4 * np.sqrt(600 * 2 / 9)


@pytest.mark.parametrize("name", WORLDS)
def test_streamed_items_have_the_size_and_length_asked_for(name: str) -> None:
    task, rng = hub.load("tasks", name), np.random.default_rng(0)
    for n in task.sizes:
        for length in (1, task.max_length(n)):
            spec = task.stream(rng, n, length)
            assert spec.n == n
            if name != "gridspatial":
                assert len(spec.world.get("actions", [0] * spec.world.get("k", 0))) == length


# ---------------------------------------------------------------- difficulty and options


def test_levels_of_held_out_mazes_come_in_the_stated_shares() -> None:
    task = hub.load("tasks", "maze")
    levels = [task._difficulty(s, task.trace(s))["level"] for s in specs(task, "val", 400)]
    share = {x: levels.count(x) / len(levels) for x in ("easy", "medium", "hard")}
    assert share["easy"] == pytest.approx(0.40, abs=0.15)
    assert share["hard"] == pytest.approx(0.25, abs=0.15)
    assert level_of(12, 6, 0.3, 0.02) == (0.72, "hard")


def test_wrong_options_say_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="nano"):
        hub.load("tasks", "maze", preset="huge")
    with pytest.raises(ConfigError, match="variant"):
        hub.load("tasks", "arrows", variant="mvot")
    with pytest.raises(ConfigError, match="no such option"):
        hub.load("tasks", "arrows", varant="quad")
    with pytest.raises(ConfigError, match="another preset"):
        hub.load("tasks", "gridspatial", preset="ood-hops").spec("test", 0)
    with pytest.raises(ConfigError, match="train, val, test"):
        hub.load("tasks", "maze").spec("dev", 0)
    with pytest.raises(ConfigError, match="give n"):
        list(hub.load("tasks", "maze").samples("train"))
    with pytest.raises(ConfigError, match="mvot skin"):
        hub.load("tasks", "arrows", skin="mvot").draw(hub.load("tasks", "arrows").spec("val", 0))


def test_samples_come_in_order_from_an_offset() -> None:
    task = hub.load("tasks", "arrows", preset="nano")
    assert [s.id for s in task.samples("val", 2, offset=198)] == [
        "arrows-v1-nano-val-000198",
        "arrows-v1-nano-val-000199",
    ]
    assert len(list(task.samples("val", offset=197))) == 3


def test_a_group_counts_when_all_of_it_is_right() -> None:
    assert group_accuracy(["a", "a", "b", "", ""], [1, 0, 1, 1, 0]) == 0.5


def test_states_that_look_alike_are_equal() -> None:
    assert State((1, 2), 3, "ice") == State((1, 2), 4, "hole") != State((1, 1), 3, "ice")
