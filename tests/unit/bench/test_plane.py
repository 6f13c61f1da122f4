"""Planes: the principal components are the widest axes, and t-SNE keeps neighbours together."""

import math

import pytest
import torch

from mmroute.bench.plane import neighbours, on_plane
from mmroute.errors import ConfigError


def points(seed=0):
    generator = torch.Generator().manual_seed(seed)
    middle = 8 * torch.randn(3, 10, generator=generator)
    return torch.cat([m + torch.randn(12, 10, generator=generator) for m in middle])


def test_principal_components_are_those_of_the_covariance():
    x = points()
    flat = on_plane(x)
    centred = x - x.mean(0)
    variance = torch.linalg.eigvalsh(centred.T @ centred)
    torch.testing.assert_close((flat.T @ flat).diagonal(), variance.flip(0)[:2], rtol=1e-3, atol=1e-2)
    assert abs(float(flat[:, 0] @ flat[:, 1])) < 1e-2
    line = on_plane(torch.arange(5.0)[:, None])
    assert line.shape == (5, 2)
    assert not line[:, 1].any()


def test_every_point_has_as_many_neighbours_as_asked_for():
    share = neighbours(points().double(), 7.0)
    torch.testing.assert_close(share.sum(1), torch.ones(36, dtype=torch.double))
    assert not share.diagonal().any()
    for row in share:
        entropy = -sum(float(p) * math.log(float(p)) for p in row if p > 0)
        assert math.exp(entropy) == pytest.approx(7.0, rel=1e-3)


def test_groups_stay_together_and_the_picture_is_the_same_each_time():
    x = points()
    flat = on_plane(x, "tsne")
    distance = torch.cdist(flat, flat)
    distance.fill_diagonal_(float("inf"))
    group = torch.arange(36) // 12
    assert (group[distance.argmin(1)] == group).all()
    inside = distance[group[:, None] == group].masked_select(distance[group[:, None] == group].isfinite()).max()
    assert inside < distance[group[:, None] != group].min() * 2
    assert torch.equal(flat, on_plane(x, "tsne"))


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ConfigError, match="t-SNE takes 4 to 4000 points, given 3"):
        on_plane(torch.randn(3, 4), "tsne")
    with pytest.raises(ConfigError, match="plane is pca or tsne, given 'umap'"):
        on_plane(torch.randn(5, 4), "umap")
