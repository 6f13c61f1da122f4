"""LLaVA and LLaVA-NeXT on either text model, from folders laid out as the released ones, through the path a user takes.

`llava-1.5-7b-hf` is LLaVA on Llama, with keys and values for every head; `llava-v1.6-mistral-7b-hf` is LLaVA-NeXT on
Mistral, where heads share them.
"""

import json

import families
import folders
import pytest
import torch
import transformers
from PIL import Image

import mmroute
from mmroute import backbones, hub
from mmroute.backbones.images import prepare, user_message
from mmroute.cost import kv_bytes_per_slot

PICTURE = Image.radial_gradient("L").convert("RGB").resize((40, 24))
EVERY_HEAD = {"num_key_value_heads": families.HEADS}
KINDS = {
    "llava-1.5": ("llava", "llama", EVERY_HEAD),
    "llava-on-mistral": ("llava", "mistral", {}),
    "llava-next-vicuna": ("llava_next", "llama", EVERY_HEAD),
    "llava-next-mistral": ("llava_next", "mistral", {}),
}


@pytest.fixture(scope="module", params=KINDS)
def opened(request, tmp_path_factory):
    """The kind, its folder, and what was opened."""
    name, kind, options = KINDS[request.param]
    folder = folders.write_as_released(name, tmp_path_factory.mktemp(request.param) / "model", kind=kind, **options)
    return request.param, folder, mmroute.load(folder)


def test_the_folder_is_laid_out_as_the_released_ones(opened):
    _, folder, _ = opened
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(files.values())) > 1
    assert {"language_model.model.layers.0.self_attn.k_proj.weight", "multi_modal_projector.linear_1.weight"} <= set(
        files
    )
    assert {"preprocessor_config.json", "processor_config.json", "chat_template.json"} <= {
        p.name for p in folder.iterdir()
    }
    config = json.loads((folder / "config.json").read_text())
    assert "image_token_index" in config
    assert config["vision_feature_layer"] == -2


@torch.no_grad()
def test_it_opens_as_its_family_on_its_text_model_and_equals_stock(opened):
    kind, folder, model = opened
    name, text, _ = KINDS[kind]
    family = backbones.of(model)
    assert (family.name, family.text_model(model).config.model_type) == (name, text)
    stock = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    batch = prepare(model, model.processor, user_message("where?", [PICTURE, PICTURE.rotate(90)]))
    wanted = stock(**batch).logits
    assert torch.equal(model(**batch).logits, wanted)
    everything = hub.load("prune", "fastv", start_layer=1, vision_keep=1.0)
    with mmroute.attach(model, prune=everything, executor="physical") as routed:
        torch.testing.assert_close(routed.model(**batch).logits, wanted, rtol=0, atol=1e-5)
    assert torch.equal(model(**batch).logits, wanted)


def test_its_answers_are_what_stock_generate_writes_and_routed_ones_keep_less(opened):
    kind, _, model = opened
    asked = [user_message("where?", [PICTURE]), user_message("and where from here?", [PICTURE.rotate(90)])]
    batch = prepare(model, model.processor, asked)
    wrote = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    with mmroute.attach(model) as routed:
        whole, other = routed.answer_many(asked, max_new_tokens=6)
    assert [whole.ids, other.ids] == wrote.tolist()
    with mmroute.attach(model, prune=hub.load("prune", "fastv", start_layer=1, vision_keep=0.3)) as routed:
        less = routed.answer_many(asked, max_new_tokens=6)[0]
    every, kept = (a.trace.calls[0].layers[1].ran[0][1] for a in (whole, less))
    assert kept == -(-3 * every // 10)
    heads = families.HEADS if KINDS[kind][2] else families.KV_HEADS
    assert kv_bytes_per_slot(less.trace.shape) == 2 * heads * (families.HIDDEN // families.HEADS) * 4
