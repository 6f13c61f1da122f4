"""Controls keep as many as another method: in every layer and hop, in the same way, also as a trained router does."""

import families
import pytest
import torch

import mmroute
from mmroute import hub
from mmroute.checks import check_pruner, made_up, walk
from mmroute.errors import ConfigError
from mmroute.tokens import Modality

LAYERS = 6


def shares(pruner, hop):
    return [
        [1.0 if not pruner.acts(i, LAYERS) else pruner.rate(i, LAYERS, hop, m) or 1.0 for m in Modality]
        for i in range(LAYERS)
    ]


@pytest.mark.parametrize("control", ["random", "oracle"])
@pytest.mark.parametrize(
    "like",
    [
        {"name": "fastv", "vision_keep": 0.3, "start_layer": 2},
        {"name": "pyramiddrop", "stage_keep": 0.6},
        {"name": "snapkv", "vision_keep": 0.4},
        {"name": "mod", "vision_keep": 0.4},
    ],
    ids=lambda like: like["name"],
)
def test_a_control_keeps_the_counts_of_a_method_but_not_its_choice(control, like):
    pruner = hub.load("prune", control, counts_of=like)
    other = hub.load("prune", like["name"], **{k: v for k, v in like.items() if k != "name"})
    check_pruner(pruner)
    assert pruner.action == other.action
    assert shares(pruner, 0) == shares(other, 0)
    assert not list(pruner.parameters())
    case = made_up()
    if like["name"] != "mod":  # whose scores are learned, and equal before that
        kept, theirs = walk(pruner, case, LAYERS), walk(other, case, LAYERS)
        assert [keep.ran for keep in kept] == [keep.ran for keep in theirs]
        assert any(not torch.equal(a.mask, b.mask) for a, b in zip(kept, theirs, strict=True))


@pytest.fixture
def trained(tmp_path):
    """A router folder whose rates differ by layer, hop and modality."""
    model = families.make("qwen2_5_vl", "sdpa", layers=LAYERS)
    dare = hub.load("prune", "dare", vision_keep=0.5, text_keep=0.8, first_layer=1, cutoff_layer=5)
    with mmroute.attach(model, prune=dare) as routed:
        with torch.no_grad():
            dare.rates.theta += torch.randn(dare.rates.theta.shape, generator=torch.Generator().manual_seed(1))
            dare.rates.beta += 0.5
            for rows in dare.router.values():
                rows.weight.normal_(generator=torch.Generator().manual_seed(2))
        dare.export()
        routed.save_pretrained(tmp_path / "router")
    return tmp_path / "router", dare


def test_a_folder_of_trained_routers_lends_its_rates(trained):
    folder, dare = trained
    control = hub.load("prune", "random", counts_of=f"@{folder}")
    assert control.action == "skip"
    for hop in (0, 1, 7, 20):
        for layer in range(LAYERS):
            for modality in (Modality.TEXT, Modality.VISION):
                assert control.rate(layer, LAYERS, hop, modality) == dare.rate(layer, LAYERS, hop, modality)
    assert control.rate(3, LAYERS, 0, Modality.VISION) != control.rate(3, LAYERS, 2, Modality.VISION)
    oracle = hub.load("prune", "oracle", counts_of=f"@{folder}")
    assert oracle.rate(2, LAYERS, 0, Modality.VISION) == dare.rate(2, LAYERS, 0, Modality.VISION)
    assert oracle.rate(2, LAYERS, 0, Modality.TEXT) is None
    with pytest.raises(ConfigError, match="trained on 6 layers, this model has 4"):
        control.rate(0, 4, 0, Modality.VISION)


@pytest.mark.parametrize("scorer", ["random", "oracle", "knorm"])
def test_a_trained_router_s_own_scorer_can_be_replaced_at_its_counts(trained, scorer):
    from mmroute.engine import saving

    folder, dare = trained
    model = families.make("qwen2_5_vl", "sdpa", layers=LAYERS)
    batch = families.make_inputs("qwen2_5_vl", model, batch=1, pads=[0], images=2, before=6, after=8)
    ran, kept = {}, {}
    for name in ("router", scorer):
        pruner = hub.load("prune", "dare", **{**vars(dare.config), "scorer": name})
        with mmroute.attach(model, prune=pruner) as routed, torch.no_grad():
            saving.load(routed, folder)
            model.eval()
            routed.full_trace = True
            given = {"relevance": torch.rand(batch["input_ids"].shape)} if name == "oracle" else {}
            routed.model(**batch, **given, use_cache=True)
            layers = routed.trace.calls[0].layers
        ran[name], kept[name] = [layer.ran for layer in layers], [layer.kept for layer in layers]
    assert ran["router"] == ran[scorer]
    assert kept["router"] != kept[scorer]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts_of": "runs/dare"}, "give '@FOLDER' of trained routers or"),
        ({"counts_of": "@nowhere"}, "no routers in 'nowhere'"),
        ({"counts_of": {"vision_keep": 0.5}}, "counts_of: no name given; one of"),
        ({"counts_of": {"name": "fastb"}}, "no pruner named 'fastb'"),
        ({"counts_of": {"name": "fastv"}, "vision_keep": 0.3}, "counts_of says how many run; leave out"),
    ],
)
@pytest.mark.parametrize("control", ["random", "oracle"])
def test_counts_that_cannot_be_taken_are_refused(control, options, message):
    with pytest.raises(ConfigError, match=message):
        hub.load("prune", control, **options)
