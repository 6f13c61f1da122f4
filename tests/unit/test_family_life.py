"""One life of a routed model for every family, from a folder as a user's lies on disk: load, attach, answer, generate,
train a step, save, detach, and come back on a fresh base.
"""

from pathlib import Path
from typing import Any

import families
import folders
import pytest
import torch
from PIL import Image

import mmroute
from mmroute import hub
from mmroute.backbones.images import prepare, user_message

PICTURE = Image.linear_gradient("L").resize((40, 30))
EVERY = [*families.EACH, "volcano"]


@pytest.fixture(scope="module", params=EVERY)
def folder(request: pytest.FixtureRequest, tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param != "volcano":
        return tiny_folder(request.param)
    path = tmp_path_factory.mktemp("life") / "volcano"
    folders.write_volcano(path)
    return path


def dare() -> Any:
    return hub.load("prune", "dare", first_layer=1, cutoff_layer=2, vision_keep=0.6, text_keep=0.8, variant="l")


def test_a_model_of_every_family_goes_through_all_of_it(folder: Path, tmp_path: Path) -> None:
    model = mmroute.load(folder, dtype="float32")
    batch = prepare(model, model.processor, user_message("where?", [PICTURE]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    keys = set(model.__dict__)
    with torch.no_grad():
        stock = model(**batch).logits

    routed = mmroute.attach(model, prune=dare())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in routed.parts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    routed.controller.pruner.export()
    answer = routed.answer("where?", PICTURE, max_new_tokens=4)
    assert answer.trace.calls[0].layers[2].ran[0][1] < answer.trace.calls[0].new[0][1]
    with torch.no_grad():
        written = routed.generate(**batch, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > batch["input_ids"].shape[1]

    routers = {name: value.detach().clone() for name, value in routed.parts.named_parameters()}
    model.requires_grad_(False)
    routed.unfreeze_parts()
    model.train()
    optimiser = torch.optim.SGD(routed.parts.parameters(), lr=0.5)
    words = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    loss = model(**batch, labels=words).loss
    loss.backward()
    optimiser.step()
    model.eval()
    assert torch.isfinite(loss)
    moved = [name for name, value in routed.parts.named_parameters() if not torch.equal(value, routers[name])]
    assert any(name.endswith("weight") for name in moved), "the routers have learned"
    routed.controller.pruner.export()
    with torch.no_grad():
        trained = model(**batch).logits
    routed.save_pretrained(tmp_path)

    routed.detach()
    assert set(model.__dict__) == keys
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, stock)
        again = mmroute.from_pretrained(tmp_path, base=mmroute.load(folder, dtype="float32"))
        assert torch.equal(again.model(**batch).logits, trained)
    assert not torch.equal(trained, stock)
