"""The timed ways enter the positions they claim, on a stack so small that nobody would time it."""

import json

import pytest
import torch

from mmroute.bench import latent_time
from mmroute.bench.engine_cases import Stack
from mmroute.bench.latent_time import Latent, Stock

SMALL = Stack(layers=2, hidden=32, mlp=48, heads=2, vocab=640)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(latent_time, "STACK", SMALL)
    for kind in (Latent, Stock):
        real = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, *a, real=real, **k: real(self, *a, **{**k, "stack": SMALL}))


@pytest.mark.usefixtures("small")
def test_latent_steps_enter_as_many_positions_as_the_stock_model_on_a_cache(tmp_path, capsys):
    found = latent_time.measure(rounds=1, warmup=0)
    # 220 + 3 x 33 + 6; and what entering the prefix anew costs: 220 + 253 + 286 + 319 + 6.
    assert found["token_forwards"] == {"vedas": 325, "ivtlr": 325, "stock": 325, "reforward": 1084}
    assert set(found["ratio"]) == {"vedas/stock", "ivtlr/stock", "vedas/ivtlr", "reforward/vedas"}
    latent_time.main(out=tmp_path, rounds=1, warmup=0, memory=False)
    written = json.loads((tmp_path / "latent-time.json").read_text())
    assert written["schema"] == "latent-time/1"
    assert written["reached"] == (written["ratio"]["vedas/stock"]["median"] <= 1.15)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).keys() == found["ratio"].keys()


@pytest.mark.usefixtures("small")
def test_what_is_copied_by_the_two_ways_is_an_image_token_each_time():
    run = Latent("vedas", "cpu")
    seen = []
    real = run.routed.controller.base.forward
    run.routed.controller.base.forward = lambda **given: seen.append(given) or real(**given)
    with torch.no_grad():
        run()
    chunks = [given["inputs_embeds"].shape[1] for given in seen if "inputs_embeds" in given]
    assert chunks == [33, 33, 33]
    assert len(seen) == 1 + 3 + 6
