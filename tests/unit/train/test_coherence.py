"""The densest window against looking everywhere, pixels against the grid, and where the loss sends gradients."""

import itertools

import families
import numpy as np
import pytest
import torch
from PIL import Image

import mmroute
from mmroute import backbones
from mmroute.errors import InputError
from mmroute.think.base import Thought
from mmroute.train.coherence import TokenSR, Window, closer_look, densest, pooled, sides, windows_of


def brute(picked, mass, height, width):
    """Every placement, one by one; the first of the best."""
    best = None
    for r in range(picked.shape[0] - height + 1):
        for c in range(picked.shape[1] - width + 1):
            here = [(i, j) for i in range(r, r + height) for j in range(c, c + width) if picked[i, j]]
            key = (len(here), sum(float(mass[i, j]) for i, j in here))
            if best is None or key[0] > best[0][0] or (key[0] == best[0][0] and key[1] > best[0][1] + 1e-12):
                best = key, (r, c)
    return best[1], best[0][0]


@pytest.mark.parametrize("grid", [(10, 10), (4, 9), (7, 2), (1, 6), (3, 3)])
@pytest.mark.parametrize("cells", [None, (2, 3)])
def test_the_densest_window_is_that_of_a_search_everywhere(grid, cells):
    rng = np.random.default_rng(0)
    for _ in range(30):
        picked = (rng.random(grid) < rng.choice([0.1, 0.4, 1.0])).astype(float)
        mass = rng.choice([0.25, 0.5, 1.0], grid)  # ties in numbers, and in attention too
        height, width = sides(grid, 0.3, cells)
        place, count = brute(picked, mass, height, width)
        assert densest(picked, mass, 0.3, cells)[:3] == (*place, count)


def test_the_window_follows_the_grid():
    assert sides((10, 10), 0.3) == (3, 3)
    assert sides((18, 40), 0.3) == (5, 12)
    assert sides((3, 3), 0.3) == (2, 2)
    assert sides((1, 5), 0.3) == (1, 2), "an image smaller than the least window is the window"
    assert sides((2, 5), 0.3, (6, 1)) == (2, 1)
    with pytest.raises(InputError, match=r"0 x 5 tokens has no window; use a larger image"):
        sides((0, 5), 0.3)


def thought(source, alive):
    source = torch.tensor(source)
    here = source >= 0
    embeds = torch.arange(source.numel() * 2.0).view(*source.shape, 2)
    z = torch.zeros(len(source), 1, 2)
    valid = torch.cat([here, torch.tensor(alive)[:, None]], 1) & torch.tensor(alive)[:, None]
    nothing = torch.zeros(len(source), source.shape[1] + 1, dtype=torch.long)
    return Thought(torch.cat([embeds, z], 1), valid, nothing, nothing[None], nothing[:, 0], source, here.float())


def test_of_several_images_the_best_window_of_all_is_taken():
    grids = [[(4, 4), (3, 5)], [(4, 4), (3, 5)], [(4, 4), (3, 5)]]
    # 0, 15 lie apart in the first image; 16 + 0, 1, 6 together in the second.
    step = thought([[0, 15, 16, 17, 22], [0, 1, 4, 20, 30], [0, 1, 2, 3, 4]], [True, True, False])
    found = windows_of(step, torch.ones(3, 5), grids)
    assert found == [Window(1, 0, 0, 2, 2), Window(0, 0, 0, 2, 2), None]
    assert windows_of(thought([[-1, -1]], [True]), torch.zeros(1, 2), grids[:1]) == [None]


def test_what_is_pooled_is_what_entered():
    step = thought([[-1, 3, 5], [0, 1, 2]], [True, True])
    assert pooled(step).tolist() == [[3.0, 4.0], [8.0, 9.0]]


@pytest.mark.parametrize("name", families.NAMES)
def test_cells_and_pixels_go_both_ways(name):
    family = backbones.of(families.make(name, layers=2))
    for size in ((280, 280), (301, 97), (60, 200)):
        for grid in ((10, 10), (3, 7)):
            whole = family.grid_to_pixels(size, grid, (0, 0, *grid))
            edge = min(size)
            shown = (0, 0, *size) if name.startswith("qwen") else None
            left, upper = (size[0] - edge) // 2, (size[1] - edge) // 2
            assert whole == (shown or (left, upper, left + edge, upper + edge))
            tiles = [family.grid_to_pixels(size, grid, (0, c, 1, 1)) for c in range(grid[1])]
            assert all(a[2] == b[0] for a, b in itertools.pairwise(tiles)), "neighbours meet"
            assert (tiles[0][0], tiles[-1][2]) == (whole[0], whole[2])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "chameleon", "llava"])
def test_looking_closer_is_one_call_of_the_tower_without_gradient(name, tiny_folder, monkeypatch):
    model = mmroute.load(tiny_folder(name))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8))
    with mmroute.attach(model) as routed:
        calls = []
        real = type(model).get_image_features
        monkeypatch.setattr(type(model), "get_image_features", lambda *a, **k: calls.append(1) or real(*a, **k))
        windows = [Window(0, 0, 0, 2, 2), Window(0, 1, 1, 2, 2)]
        out = closer_look(routed, [picture] * 2, windows, [(4, 4)] * 2)
    assert len(calls) == 1
    assert out.shape == (2, families.HIDDEN)
    assert not out.requires_grad
    assert not torch.equal(out[0], out[1])


def test_the_network_starts_the_same_and_takes_half_precision():
    one, two = TokenSR(8), TokenSR(8)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.float32
