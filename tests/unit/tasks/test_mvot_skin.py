"""MVoT's pictures drawn anew: geometry, one state per picture, and gymnasium's art where it is installed."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from mmroute import hub
from mmroute.errors import InputError
from mmroute.tasks import _mvot_skin
from mmroute.tasks.base import Generated, Spec


def long_item(task: Generated) -> Spec:
    return next(s for i in range(60) if len(task.trace(s := task.spec("val", i))) >= 5)


@pytest.mark.parametrize("given", [{"preset": "mvot"}, {"skin": "mvot"}])
@pytest.mark.parametrize("name", ["maze", "frozenlake"])
def test_decoding_an_mvot_picture_gives_its_state(name: str, given: dict[str, str]) -> None:
    task = hub.load("tasks", name, **given)
    spec = long_item(task)
    for state in task.trace(spec)[:5]:
        assert task.decode(task.draw(spec, state), spec) == state


@pytest.mark.parametrize("name", ["maze", "frozenlake"])
def test_a_foreign_picture_is_an_error(name: str) -> None:
    task = hub.load("tasks", name, preset="mvot")
    spec = task.spec("val", 0)
    with pytest.raises(InputError, match="px"):
        task.decode(Image.new("RGB", (17, 19)), spec)
    with pytest.raises(InputError, match="no state"):
        task.decode(Image.new("RGB", task.draw(spec).size, (90, 0, 200)), spec)


def test_a_maze_frame_has_mvots_geometry_and_the_way_grows_cell_by_cell() -> None:
    task = hub.load("tasks", "maze", preset="mvot")
    spec = long_item(task)
    frames = [np.asarray(task.draw(spec, s)).astype(int) for s in task.trace(spec)]
    assert frames[0].shape == (480, 640, 3)
    dark = np.argwhere(frames[0].sum(2) < 100)
    top, left = dark.min(0)
    bottom, right = dark.max(0)
    # the square of 369.6 px around (328, 242.4), and half of its two-point frame
    assert abs(top - 57.6) <= 2
    assert abs(left - 143.2) <= 2
    assert abs(bottom - 427.2) <= 2
    assert abs(right - 512.8) <= 2
    red = [((f[..., 0] > 120) & (f[..., 1] < 109) & (f[..., 2] < 109)).sum() for f in frames]
    assert all(a < b for a, b in pairwise(red))
    assert red[0] > 20  # the marks of start and agent


def test_open_lines_are_light_grey_and_walls_black() -> None:
    world = {"walls": "edges", "board": [[7, 13], [7, 13]], "plates": [[0, 1]] * 4}  # two rows, each one corridor
    raster = _mvot_skin._raster(world)
    assert raster.shape == (29, 29)
    assert raster[7, 14] == 246
    assert raster[14, 7] == 0
    assert raster[7, 7] == 255


def test_the_figure_faces_its_last_move_and_a_fall_shows_cracked_ice() -> None:
    task = hub.load("tasks", "frozenlake", preset="mvot")
    spec = next(s for i in range(90) if (s := task.spec("val", i)).answer == 1 and len(task.trace(s)) > 2)
    trace = task.trace(spec)
    sprites = _mvot_skin._sprites()
    assert task.draw(spec).size == (64 * spec.n, 64 * spec.n)

    def cell(state: int) -> np.ndarray:
        row, col = trace[state].cell
        return np.asarray(task.draw(spec, trace[state]).crop((col * 64, row * 64, col * 64 + 64, row * 64 + 64)))

    start = Image.new("RGBA", (64, 64))
    for layer in ("ice", "stool"):
        start.alpha_composite(sprites[layer])
    start.alpha_composite(sprites["elf_down"])
    inner = (slice(2, 62), slice(2, 62))
    assert np.array_equal(cell(0)[inner], np.asarray(start.convert("RGB"))[inner])
    fallen = Image.new("RGBA", (64, 64))
    for layer in ("ice", "hole", "cracked_hole"):
        fallen.alpha_composite(sprites[layer])
    assert np.array_equal(cell(-1)[inner], np.asarray(fallen.convert("RGB"))[inner])


def test_own_art_is_used_without_gymnasium_and_every_layer_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mvot_skin, "_gymnasium_art", lambda: None)
    _mvot_skin._sprites.cache_clear()
    sprites = _mvot_skin._sprites()
    _mvot_skin._sprites.cache_clear()
    assert len({s.tobytes() for s in sprites.values()}) == len(sprites) == 9


@pytest.mark.parametrize(("age", "known"), [("0.29.1", True), ("1.3.0", True), ("1.4.0", False), ("0.28.1", False)])
def test_only_gymnasiums_with_the_old_art_are_asked(age: str, known: bool, tmp_path, monkeypatch) -> None:
    (tmp_path / "envs" / "toy_text" / "img").mkdir(parents=True)
    found = type("Found", (), {"origin": str(tmp_path / "__init__.py")})()
    monkeypatch.setattr(_mvot_skin, "version", lambda _: age)
    monkeypatch.setattr(_mvot_skin.importlib.util, "find_spec", lambda _: found)
    assert (_mvot_skin._gymnasium_art() is not None) == known
