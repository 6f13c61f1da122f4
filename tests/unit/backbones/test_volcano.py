"""A folder in VolCano's own layout opens as the LLaVA it is, through the path a user takes, and routes like one."""

import json

import folders
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mmroute
from mmroute import backbones, hub
from mmroute.backbones import volcano
from mmroute.backbones.images import prepare, user_message
from mmroute.errors import CheckpointMismatch

PICTURE = Image.linear_gradient("L").resize((40, 24))


@pytest.fixture(scope="module", params=["linear", "mlp2x_gelu"])
def opened(request, tmp_path_factory):
    """What was written, and what was opened."""
    folder = tmp_path_factory.mktemp("volcano") / "checkpoint"
    stock = folders.write_volcano(folder, request.param)
    return stock, mmroute.load(folder)


@torch.no_grad()
def test_logits_are_those_of_the_stock_wiring(opened):
    stock, model = opened
    assert backbones.of(model).name == "llava"
    batch = prepare(model, model.processor, user_message("where?", [PICTURE, PICTURE.rotate(90)]))
    image = batch["input_ids"] == model.config.image_token_id
    assert int(image.sum()) == 32
    known = stock.config.text_config.vocab_size
    assert model.config.image_token_id == known  # one row more than the release's table has
    embeds = stock.get_input_embeddings()(batch["input_ids"].masked_fill(image, 0))
    features = stock.model.get_image_features(batch["pixel_values"]).pooler_output
    embeds = embeds.masked_scatter(image[..., None], torch.cat(list(features)))
    wanted = stock(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(model(**batch).logits[..., :known], wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_it_answers_routed_and_comes_back(opened):
    _, model = opened
    batch = prepare(model, model.processor, user_message("where?", [PICTURE]))
    plain = model(**batch).logits
    with mmroute.attach(model, prune=hub.load("prune", "fastv", start_layer=1, vision_keep=0.3)) as routed:
        answer = routed.answer("where?", PICTURE, max_new_tokens=3)
    assert answer.trace.calls[0].layers[1].ran[0][1] == 5
    assert torch.equal(model(**batch).logits, plain)


def test_images_are_padded_to_a_square_and_the_prompt_is_mistrals(opened):
    _, model = opened
    text = model.processor.apply_chat_template(user_message("where?", [PICTURE]), tokenize=False)
    assert text == "<s>[INST] <ImageHere>\nwhere? [/INST]"
    pixels = prepare(model, model.processor, user_message("where?", [PICTURE]))["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels[0, :, 1].std() < 0.02  # 40 x 24 px: a band of one colour above and below
    assert pixels[0, :, 8:24, 16].std() > 0.3


def test_a_weight_that_is_missing_is_named(tmp_path):
    folders.write_volcano(tmp_path / "v")
    for file in sorted((tmp_path / "v").glob("*.safetensors")):
        left = {k: v for k, v in load_file(file).items() if "patch_embedding" not in k}
        save_file(left, file)
    with pytest.raises(CheckpointMismatch, match=r"no weight .*patch_embedding.* front_mm_projector"):
        mmroute.load(tmp_path / "v")
    index = json.loads((tmp_path / "v" / "model.safetensors.index.json").read_text())
    (tmp_path / "v" / min(index["weight_map"].values())).unlink()
    with pytest.raises(CheckpointMismatch, match="missing model-00001-of-00002"):
        mmroute.load(tmp_path / "v")


def test_pickled_weights_are_not_told_to_be_converted_by_a_class_that_does_not_know_the_model(tmp_path):
    folders.write_volcano(tmp_path / "v")
    for file in (tmp_path / "v").glob("*.safetensors*"):
        file.unlink()
    (tmp_path / "v" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointMismatch, match=r"weights are pickled \(pytorch_model.bin\).*to safetensors$"):
        mmroute.load(tmp_path / "v")


@pytest.mark.parametrize(
    ("key", "stock"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.language_model.layers.3.self_attn.q_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("vision_encoder.vision_tower.vision_model.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"),
        ("front_mm_projector.weight", "model.multi_modal_projector.linear_1.weight"),
        ("front_mm_projector.2.bias", "model.multi_modal_projector.linear_2.bias"),
        ("vision_encoder.vision_tower.vision_model.embeddings.position_ids", None),
        ("behind_projector.weight", None),
    ],
)
def test_names_of_weights(key, stock):
    assert volcano.rename(key) == stock
