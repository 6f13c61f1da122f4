"""A model loaded with flash attention routes as one loaded with sdpa; the kernels stand in by their definition."""

import copy

import flash
import pytest
import routing
from cases import LAYERS, Case, grid
from routing import distance

import mmroute

GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@grid(attn=("sdpa",), rows=("three", "padded"))
def test_flash_routes_as_sdpa_does(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = flash.install(monkeypatch)
    model, batch = copy.deepcopy(case.model), case.prompt
    case.family.text_model(model).config._attn_implementation_internal = "flash_attention_2"  # as if loaded with it
    stock = model.generate(**batch, **GREEDY)
    with case.attached(routing.Longest()) as routed:
        want = routed.generate(**batch, **GREEDY)
        beams = routed.generate(**batch, max_new_tokens=3, num_beams=2, do_sample=False)
    with mmroute.attach(model, prune=routing.Longest()) as routed:
        out = routed.generate(**batch, **GREEDY)
        assert routed.generate(**batch, max_new_tokens=3, num_beams=2, do_sample=False).equal(beams)
        with routed.off():  # the stock model, under the name the routed backend is registered by
            off = model.generate(**batch, **GREEDY)
    assert max(distance(a, b) for a, b in zip(out.logits, want.logits, strict=True)) <= 1e-5
    assert out.past_key_values.lengths() == want.past_key_values.lengths()
    assert len(out.past_key_values.lengths()) == LAYERS
    assert all(a.equal(b) for a, b in zip(off.logits, stock.logits, strict=True))
    assert set(asked) == {"flash_attention_2"}
