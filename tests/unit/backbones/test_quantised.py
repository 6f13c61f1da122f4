"""Weights that torchao quantised while they were read: the model routes, and what it keeps whole is its own stock.

`make test-all` brings torchao, which costs every command half a second and some noise; without it `load` says what is
missing (`test_load.py`).
"""

from typing import Any

import families
import pytest
import torch
import transformers
from PIL import Image

import mmroute
from mmroute import backbones, hub
from mmroute.backbones.images import prepare, user_message
from mmroute.bench.record import hash_weights

pytest.importorskip("torchao", reason="make test-all installs torchao")

PICTURE = Image.linear_gradient("L").resize((40, 30))


@pytest.fixture(scope="module", params=families.EACH)
def model(request: pytest.FixtureRequest, tiny_folder: Any) -> Any:
    """int8 weights, of the linear layers of the text model and the tower."""
    from torchao.quantization import Int8WeightOnlyConfig

    asked = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return mmroute.load(tiny_folder(request.param), dtype="float32", quantization=asked)


def dare(**options: Any) -> Any:
    return hub.load("prune", "dare", first_layer=1, cutoff_layer=2, variant="l", **options)


@torch.no_grad()
def test_an_int8_model_routes_answers_and_comes_back(model: Any) -> None:
    projection = backbones.of(model).text_model(model).layers[1].self_attn.q_proj.weight
    assert "Int8" in type(projection.data).__name__
    batch = prepare(model, model.processor, user_message("where?", [PICTURE]))
    stock, written = model(**batch).logits, model.generate(**batch, max_new_tokens=4, do_sample=False)
    with mmroute.attach(model, prune=dare(vision_keep=1.0, text_keep=1.0), strip_padding=True) as routed:
        torch.testing.assert_close(model(**batch).logits, stock, rtol=0, atol=1e-5)
        assert torch.equal(routed.generate(**batch, max_new_tokens=4, do_sample=False), written)
    pruner = dare(vision_keep=0.6, text_keep=0.8)
    with mmroute.attach(model, prune=pruner) as routed:
        for parameter in pruner.parameters():
            parameter.copy_(torch.randn_like(parameter))
        pruner.export()
        answer = routed.answer("where?", PICTURE, max_new_tokens=4)
        assert answer.trace.calls[0].layers[2].ran[0][1] < answer.trace.calls[0].new[0][1]
    assert torch.equal(model(**batch).logits, stock)


def test_a_result_of_quantised_weights_names_no_hash_of_them(model: Any) -> None:
    assert hash_weights(model) == ""
