"""Simulators agree with a second opinion, and pictures say exactly what the simulator says."""

import dataclasses

import numpy as np
import pytest
from worlds import ON_GROUND, WORLDS, existing, specs

from mmroute import hub
from mmroute.tasks import _skins
from mmroute.tasks._solver import solve
from mmroute.tasks._texts import IMAGE


@pytest.mark.parametrize(("name", "preset"), existing(["nano", "tiny", "small", "wide", "ood-size", "ood-hops"]))
def test_a_solver_that_reads_tiles_agrees_with_the_simulator(name: str, preset: str) -> None:
    task = hub.load("tasks", name, preset=preset)
    # Held-out lists of minibehavior are searched for; two eights and sixty of its stream show as much.
    made = [*specs(task, "train", 60), *specs(task, "test", 16 if name == "minibehavior" else 40)]
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


@pytest.mark.parametrize("name", WORLDS)
def test_a_picture_is_exactly_atlas_tiles(name: str) -> None:
    task = hub.load("tasks", name)
    spec = task.spec("val", 1)
    tiles = _skins.encode(task.draw(spec), 28)
    atlas = _skins.atlas(28)
    codes = task.codes(spec)
    assert codes.dtype == np.int16
    assert codes.shape == (spec.canvas, spec.canvas) == tiles.shape[:2]
    for r, c in np.ndindex(codes.shape):
        assert any(np.array_equal(tiles[r, c], atlas[codes[r, c], v]) for v in range(_skins.VARIANTS))


@pytest.mark.parametrize("px", [14, 16, 28, 32])
def test_all_codes_are_read_back_at_the_strongest_noise(px: int) -> None:
    codes = np.arange(256) % _skins.NUM_CODES
    picture = _skins.picture(codes.reshape(16, 16), 7, px, 0.05)
    assert np.array_equal(_skins.read(picture, px).reshape(-1), codes)


@pytest.mark.parametrize("name", ON_GROUND)
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


@pytest.mark.parametrize("name", ON_GROUND[:4])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_cell_over_four_tiles_reads_and_decodes_as_one(name: str, noise: float) -> None:
    task = hub.load("tasks", name, tokens_per_cell=4, noise=noise)
    assert max(task.sizes) == 5  # six cells of two tiles do not fit on ten
    for spec in specs(task, "val", 2):
        codes, board = task.codes(spec), task.board(spec)
        assert len(board) == 4 * spec.n**2
        assert (codes.reshape(-1)[board] >= _skins.QUARTERS).all()
        assert np.array_equal(task.cells(spec, codes), task._board_codes(spec, None))
        assert solve(name, task.question_words(spec), task.cells(spec, codes)) == task._answer_word(spec)
        needed = {t for hop in range(len(task.trace(spec)) + 1) for t in task.relevant(spec, hop)}
        assert needed <= set(board)
        assert len(needed) % 4 == 0
        for state in task.trace(spec):
            assert task.decode(task.draw(spec, state), spec) == state


def test_four_tiles_show_what_one_of_twice_the_side_shows() -> None:
    one = hub.load("tasks", "maze", tile_px=28, noise=0.0)
    four = hub.load("tasks", "maze", tile_px=14, noise=0.0, tokens_per_cell=4)
    spec = next(s for i in range(60) if (s := four.spec("val", i)).n == 4)
    whole = dataclasses.replace(spec, canvas=5, offset=(spec.offset[0] // 2, spec.offset[1] // 2))
    even = dataclasses.replace(spec, offset=(whole.offset[0] * 2, whole.offset[1] * 2))
    top, left = (28 * x for x in whole.offset)
    box = (left, top, left + 28 * 4, top + 28 * 4)
    assert one.draw(whole).crop(box).tobytes() == four.draw(even).crop(box).tobytes()


def test_fog_on_one_of_four_tiles_hides_the_cell() -> None:
    task = hub.load("tasks", "frozenlake", tokens_per_cell=4)
    spec = task.spec("val", 0)
    codes = task.codes(spec)
    codes.reshape(-1)[task.tiles(spec, [(1, 2)])[3]] = _skins.FOG
    assert task.cells(spec, codes)[1, 2] == _skins.FOG
    assert (task.cells(spec, codes) == _skins.FOG).sum() == 1


@pytest.mark.parametrize("name", WORLDS)
def test_the_other_skin_looks_different_and_means_the_same(name: str) -> None:
    task = hub.load("tasks", name, preset="ood-skin")
    plain = hub.load("tasks", name)
    for spec in specs(task, "test", 3):
        assert task.draw(spec).tobytes() != plain.draw(spec).tobytes()
        for state in task.trace(spec):
            assert task.decode(task.draw(spec, state), spec) == state


def test_pixels_through_the_processor_are_atlas_tiles_and_one_token_each() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 784 * 256})
    task = hub.load("tasks", "maze")
    spec = task.spec("val", 2)
    made = processor(images=[task.draw(spec)], return_tensors="np")
    assert made["image_grid_thw"].tolist() == [[1, 20, 20]]  # merged 2 x 2: one hundred tokens
    atlas = _skins.atlas(28)
    tiles = atlas[task.codes(spec), _skins.variants(spec.seed, 10)].reshape(100, 28, 28, 3)
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    wanted = (tiles / 255 - mean) / std
    # a token is its four patches, each of two equal frames: (token, patch row, patch column, channel, frame, y, x)
    seen = made["pixel_values"].reshape(100, 2, 2, 3, 2, 14, 14)
    assert np.allclose(seen[:, :, :, :, 0], seen[:, :, :, :, 1], atol=0)
    seen = seen[:, :, :, :, 0].transpose(0, 1, 4, 2, 5, 3).reshape(100, 28, 28, 3)
    assert np.abs(seen - wanted).max() < 1e-6
