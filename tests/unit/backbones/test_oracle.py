"""The oracle is trusted by every equality test, so it is checked first, against stock models and by hand."""

import families
import pytest
import torch
from oracle import closed_later, masked_forward

from mmroute import backbones

CASES = [
    pytest.param(1, None, id="one row"),
    pytest.param(3, None, id="three rows"),
    pytest.param(3, [0, 3, 2], id="three rows, left-padded"),
]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("batch", "pads"), CASES)
@pytest.mark.parametrize("name", families.NAMES)
@torch.no_grad()
def test_with_everything_kept_the_oracle_is_the_stock_model(name, batch, pads, attn):
    model = families.make(name, attn)
    family = backbones.of(model)
    inputs = families.make_inputs(name, model, batch, pads, images=2)
    positions = family.positions(model, inputs["input_ids"], inputs["attention_mask"], inputs.get("image_grid_thw"))
    stock = model(**inputs, position_ids=positions).logits
    masked = masked_forward(model, family, inputs, [None] * 5)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(masked[real], stock[real], rtol=0, atol=1e-5)
    assert not any("forward" in layer.__dict__ for layer in family.text_model(model).layers)


@pytest.mark.parametrize("name", families.NAMES)
def test_positions_dropped_everywhere_could_as_well_not_exist(name):
    model = families.make(name)
    family = backbones.of(model)
    inputs = families.make_inputs(name, model, 1)
    N = inputs["input_ids"].shape[1]
    keep = torch.ones(1, N, dtype=torch.bool)
    keep[0, [2, N - 4, N - 2]] = False  # text before and after the image: no image feature loses its placeholder
    full = masked_forward(model, family, inputs, [keep] * 5)
    positions = family.positions(model, inputs["input_ids"], inputs["attention_mask"], inputs.get("image_grid_thw"))
    short = {**inputs, **{k: inputs[k][keep][None] for k in ("input_ids", "attention_mask")}}
    short.pop("mm_token_type_ids", None)
    with torch.no_grad():
        shorter = model(**short, position_ids=positions[..., keep[0]]).logits
    torch.testing.assert_close(full[keep], shorter[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", families.NAMES)
def test_a_position_kept_nowhere_leaves_its_embedding_and_changes_nobody(name):
    model = families.make(name)
    family = backbones.of(model)
    inputs = families.make_inputs(name, model, 1)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, 2] = 333
    everything = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    without = everything.clone()
    without[0, 2] = False
    a, b = (masked_forward(model, family, x, [without] * 5) for x in (inputs, other))
    rest = [i for i in range(a.shape[1]) if i != 2]
    assert torch.equal(a[:, rest], b[:, rest])
    c, d = (masked_forward(model, family, x, [None] * 5) for x in (inputs, other))
    assert (c[:, 3:] - d[:, 3:]).abs().amax() > 1e-2  # kept, the same change is felt: the test can fail


def test_only_later_hops_lose_a_closed_key():
    hop = torch.tensor([[0, 0, 1, 1]])
    stays = torch.tensor([[True, False, True, True]])
    visible = closed_later(hop, stays)
    assert visible[0, 1].tolist() == [True, True, True, True]
    assert visible[0, 2].tolist() == [True, False, True, True]


def test_a_key_hidden_from_later_hops_still_serves_its_own():
    model = families.make("llava")
    family = backbones.of(model)
    inputs = families.make_inputs("llava", model, 1)
    N = inputs["input_ids"].shape[1]
    hop = (torch.arange(N) >= 28)[None].long()
    stays = torch.ones(1, N, dtype=torch.bool)
    stays[0, 10:15] = False
    plain = masked_forward(model, family, inputs, [None] * 5)
    closed = masked_forward(model, family, inputs, [None] * 5, [closed_later(hop, stays)] * 5)
    torch.testing.assert_close(closed[:, :28], plain[:, :28], rtol=0, atol=1e-5)
    assert (closed[:, 28:] - plain[:, 28:]).abs().amax() > 1e-2


def test_an_attached_model_is_refused():
    model = families.make("llava")
    family = backbones.of(model)
    layer = family.text_model(model).layers[0]
    layer.forward = layer.forward
    with pytest.raises(ValueError, match="never attached"):
        masked_forward(model, family, families.make_inputs("llava", model), [None] * 5)
