"""Options that cannot work are refused when the pruner is made, with what to do instead."""

import pytest
import torch

from mmroute import hub
from mmroute.checks import made_up, walk
from mmroute.errors import ConfigError
from mmroute.prune._rank import lexicographic
from mmroute.tokens import Modality


@pytest.mark.parametrize("name", ["random", "oracle", "fastv", "knorm"])
@pytest.mark.parametrize("keep", [-0.1, 1.5])
def test_keep_rates_outside_0_to_1_are_refused_with_the_path(name: str, keep: float) -> None:
    with pytest.raises(ConfigError, match=rf"prune\.{name}\.vision_keep: .* \(given {keep}\)"):
        hub.load("prune", name, vision_keep=keep)


def test_an_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"prune\.fastv\.vision_kep: no such option; known: vision_keep, start_layer"):
        hub.load("prune", "fastv", vision_kep=0.3)


def test_schedule_refuses_to_rank_layer_0_by_attention_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="no layer before it"):
        hub.load("prune", "schedule", vision=[0.5, 0.5])
    hub.load("prune", "schedule", vision=[0.5, 0.5], scorer="knorm")


def test_schedule_refuses_rising_rates_where_nothing_comes_back() -> None:
    with pytest.raises(ConfigError, match=r"rises to 0\.8 at entry 2"):
        hub.load("prune", "schedule", vision=[1.0, 0.5, 0.8], scope="drop")


def test_schedule_has_one_exact_entry_per_layer_and_interpolates_other_depths() -> None:
    pruner = hub.load("prune", "schedule", vision=[1.0, 0.5, 0.0])

    def rates(num_layers: int) -> list[float | None]:
        return [pruner.rate(layer, num_layers, 0, Modality.VISION) for layer in range(num_layers)]

    assert rates(3) == [None, 0.5, 0.0]
    assert rates(5) == [None, 0.75, 0.5, 0.25, 0.0]
    assert rates(1) == [None]
    assert rates(2) == [None, 0.0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snapkv", {"kernel": 4}, "a window around a position is odd"),
        ("reroute", {"stages": []}, "nothing would ever be pruned"),
        ("sparsevlm", {"keeps": [0.5, 0.3]}, "2 keeps and 3 cuts"),
        ("sparsevlm", {"keeps": [0.3, 0.5, 0.2]}, "dropped positions never return"),
    ],
)
def test_peers_refuse_what_cannot_work(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hub.load("prune", name, **options)


def test_dart_on_a_model_without_its_layer_is_refused_rather_than_idle() -> None:
    with pytest.raises(ConfigError, match="nothing would ever be pruned"):
        walk(hub.load("prune", "dart", start_layer=6), made_up(), num_layers=6)


def test_fastv_on_a_model_without_its_layer_is_refused_rather_than_idle() -> None:
    with pytest.raises(ConfigError, match="nothing would ever be pruned"):
        walk(hub.load("prune", "fastv", start_layer=6), made_up(), num_layers=6)


def test_a_pruner_that_asks_for_what_it_does_not_need_is_told_so() -> None:
    pruner = hub.load("prune", "fastv")
    pruner.needs = frozenset()
    with pytest.raises(ConfigError, match="'row', which is not in its `needs`"):
        walk(pruner, made_up())


def test_rank_in_the_hop_ignores_padding_and_restarts_at_each_hop() -> None:
    case = made_up([[(0, Modality.TEXT, 3), (1, Modality.TEXT, 4)], [(0, Modality.TEXT, 2), (1, Modality.TEXT, 2)]])
    ranks = case.tokens.rank
    assert ranks[0].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert ranks[1, 3:].tolist() == [0, 1, 0, 1]


def test_lexicographic_order_asks_the_second_score_only_on_ties() -> None:
    first, second = torch.tensor([[9.0, 1.0, 2.0, 1.0, 2.0]]), torch.tensor([[0.9, 0.2, 0.1, 0.3, 0.4]])
    valid = torch.tensor([[False, True, True, True, True]])
    scores = lexicographic(first, second, valid)
    assert scores[0, 1:].tolist() == [-3.0, -1.0, -2.0, 0.0]
