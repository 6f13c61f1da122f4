"""Checkpoints load, with their processor, for every family; what is wrong with one is said by name."""

import json
import logging
import re
import shutil
from types import SimpleNamespace

import families
import folders
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from vqgan import vqgan_weights

import mmroute
from mmroute import backbones
from mmroute.backbones import load as loading
from mmroute.backbones.images import prepare, user_message
from mmroute.backbones.load import load
from mmroute.errors import CheckpointMismatch, ConfigError, MissingExtra, UnsupportedBackbone


@pytest.fixture
def copied(tiny_folder, tmp_path):
    """A folder of LLaVA's that a test may break."""
    return shutil.copytree(tiny_folder("llava"), tmp_path / "copy")


@pytest.mark.parametrize("name", families.NAMES)
@torch.no_grad()
def test_a_folder_of_each_family_loads_with_its_processor_and_answers(name, tiny_folder):
    model = load(tiny_folder(name))
    assert backbones.of(model).name == name
    assert not model.training
    assert model.__dict__["processor"].tokenizer.padding_side == "left"
    assert model.processor.chat_template
    assert model.config.name_or_path == str(tiny_folder(name))
    batch = prepare(model, model.processor, user_message("where?", [_picture()]))
    stock = transformers.AutoModelForImageTextToText.from_pretrained(tiny_folder(name)).eval()
    assert torch.equal(model(**batch).logits, stock(**batch).logits)
    assert model.generate(**batch, max_new_tokens=2).shape[1] > batch["input_ids"].shape[1]


@pytest.mark.parametrize("name", [n for n in families.NAMES if n.startswith("qwen")])
def test_a_processor_without_videos_saves_and_loads_like_the_stock_one(name, tiny_folder, tmp_path):
    processor = load(tiny_folder(name)).processor
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == type(processor).__name__
    again = loading._processor(tmp_path, name)
    assert again.chat_template == processor.chat_template
    assert again.image_token_id == processor.image_token_id


def test_dtype_and_attention_are_those_asked_for(tiny_folder):
    model = load(tiny_folder("llava"), dtype="bfloat16", attention="eager", device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.config.text_config._attn_implementation == "eager"
    assert load(tiny_folder("llava"), dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, r"dtype: one of float32, bfloat16, float16 \(given 'int8'\)"),
        ({"attention": "flex_attention"}, r"attention: one of sdpa, eager, .* \(given 'flex_attention'\)"),
        ({"device": "cpu", "device_map": "auto"}, "both say where the model goes; give one"),
        ({"device_map": 7}, r"device_map: \"auto\", a device, or module name to device \(given 7\)"),
        ({"device_map": "toaster"}, r"device: cpu, cuda, cuda:N or mps \(given 'toaster'\)"),
        ({"device": "toaster"}, r"device: cpu, cuda, cuda:N or mps \(given 'toaster'\)"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(options, message, tiny_folder):
    with pytest.raises(ConfigError, match=message):
        load(tiny_folder("llava"), **options)


def test_cuda_where_there_is_none_is_refused_before_loading(monkeypatch, tiny_folder):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"no CUDA device .*use cpu"):
        load(tiny_folder("llava"), device="cuda:0")


def test_every_missing_file_is_named_in_one_message(copied):
    for file in ("config.json", "model.safetensors", "tokenizer.json", "processor_config.json"):
        (copied / file).unlink()
    with pytest.raises(CheckpointMismatch) as caught:
        load(copied)
    for file in ("config.json", "model.safetensors", "tokenizer.json", "processor_config.json"):
        assert file in str(caught.value)
    assert str(copied) in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json"])
def test_one_missing_file_is_named_alone(file, copied):
    (copied / file).unlink()
    with pytest.raises(CheckpointMismatch, match=f"missing {file}") as caught:
        load(copied)
    others = {"config.json", "model.safetensors", "tokenizer.json"} - {file}
    assert not any(f" {other}" in str(caught.value).split("missing")[1] for other in others)


@pytest.mark.parametrize("name", families.NAMES)
def test_sharded_weights_load_and_a_missing_shard_is_named(name, tiny_folder, tmp_path):
    folder = folders.write(name, tmp_path / "shards", shard="200KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (folder / "model.safetensors").exists()
    whole, again = load(tiny_folder(name)).state_dict(), load(folder).state_dict()
    assert whole.keys() == again.keys()
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    shards[1].unlink()
    named = rf"missing {shards[1].name} \(named in model.safetensors.index.json\)"
    with pytest.raises(CheckpointMismatch, match=named):
        load(folder)


@pytest.mark.parametrize("name", families.NAMES)
def test_a_folder_of_older_releases_loads_with_the_same_processor(name, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder(name), tmp_path / "older")
    folders.as_older_releases(folder)
    assert {"preprocessor_config.json", "chat_template.json"} <= {file.name for file in folder.iterdir()}
    old, new = load(folder), load(tiny_folder(name))
    assert type(old.processor).__name__ == type(new.processor).__name__
    assert old.processor.chat_template == new.processor.chat_template
    asked = user_message("where?", [_picture()])
    ours, theirs = (prepare(model, model.processor, asked) for model in (old, new))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_pickled_weights_are_not_opened_and_the_command_told_converts_them(tiny_folder, copied):
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(CheckpointMismatch, match=r"weights are pickled \(pytorch_model.bin\)") as caught:
        load(copied)
    told = re.search(r"convert: python -c '(.*)'$", str(caught.value))
    exec(told[1], {})
    assert (copied / "model.safetensors").exists()
    found, whole = load(copied).state_dict(), load(tiny_folder("llava")).state_dict()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], value) for key, value in whole.items())


@pytest.mark.parametrize(("marker", "hint"), [("mmroute.json", "routing parts"), ("adapter_config.json", "PEFT")])
def test_a_folder_of_another_kind_says_how_to_use_it(marker, hint, tmp_path):
    (tmp_path / marker).write_text("{}")
    with pytest.raises(CheckpointMismatch, match=hint):
        load(tmp_path)


def test_broken_files_are_named(copied):
    good = (copied / "config.json").read_text()
    (copied / "config.json").write_text(good[:-9])
    with pytest.raises(CheckpointMismatch, match=r"config\.json is not JSON"):
        load(copied)
    (copied / "config.json").write_text("[]")
    with pytest.raises(CheckpointMismatch, match="no JSON object"):
        load(copied)
    (copied / "config.json").write_text(good)
    (copied / "model.safetensors").write_bytes(b"not a weight")
    with pytest.raises(CheckpointMismatch, match="weights cannot be read"):
        load(copied)


def test_weights_of_another_model_are_refused_and_never_filled_with_random_ones(copied):
    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatch, match="weights are not in the checkpoint"):
        load(copied)
    config["text_config"]["num_hidden_layers"] -= 1
    config["text_config"]["intermediate_size"] *= 2
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatch, match="weights cannot be read"):
        load(copied)


def test_a_base_saved_while_attached_is_loaded_with_a_warning(copied, caplog):
    model = load(copied)
    model.mmroute = torch.nn.Linear(2, 2)
    model.save_pretrained(copied)
    with caplog.at_level(logging.WARNING):
        load(copied)
    assert "saved while routing was attached" in caplog.text


def test_an_unknown_model_type_is_refused_before_its_weights_are_read(copied):
    (copied / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsupportedBackbone, match=r"model_type 'gpt2'; supported: qwen2_vl, .*llava"):
        load(copied)


def test_what_is_neither_folder_nor_bundled_nor_an_id_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_ASSETS", tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"'tiny' is no folder and no bundled checkpoint \(bundled: none"):
        load()
    with pytest.raises(CheckpointMismatch, match="is no folder"):
        load(tmp_path / "absent")
    with pytest.raises(CheckpointMismatch, match="is no folder"):
        load("./absent/folder")


def test_a_hub_id_offline_says_how_to_get_it():
    with pytest.raises(CheckpointMismatch, match=r"'nobody/nothing' is no folder.*hf download nobody/nothing"):
        load("nobody/nothing")


def test_a_bundled_checkpoint_loads_by_name_and_is_the_default(tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder("qwen2_5_vl"), tmp_path / "tiny")
    monkeypatch.setattr(loading, "_ASSETS", tmp_path)
    assert loading.bundled() == ["tiny"]
    assert load().config.name_or_path == "tiny"
    with pytest.raises(CheckpointMismatch, match="bundled: tiny"):
        load("huge")


@torch.no_grad()
def test_anoles_folder_is_chameleons_with_a_decoder_and_writes_images_once_unlocked(tiny_folder, tmp_path, caplog):
    folder = shutil.copytree(tiny_folder("chameleon"), tmp_path / "anole")
    weights = load_file(folder / "model.safetensors")
    drawn = vqgan_weights(families.config("chameleon").vq_config)
    decoder = {f"model.vqmodel.decoder.{name}": value for name, value in drawn.items()}
    (folder / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": weights, "model-00002-of-00002.safetensors": decoder}
    for file, tensors in parts.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, tensors in parts.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, **index}))
    model = load(folder)
    assert not [record for record in caplog.records if record.name.startswith("mmroute")]
    assert model.picture_decoder is not None
    batch = prepare(model, model.processor, user_message("draw", [_picture()]))
    family, codes = backbones.of(model), backbones.of(model).image_tokens(model)
    lowest = torch.finfo(model.dtype).min
    assert (model(**batch).logits[0, -1, codes] == lowest).all()
    family.unlock_images(model)
    assert (model(**batch).logits[0, -1, codes] > lowest).all()
    family.lock_images(model)
    assert (model(**batch).logits[0, -1, codes] == lowest).all()


@torch.no_grad()
def test_a_device_map_puts_the_layers_where_it_says_and_they_route(tiny_folder, tmp_path):
    plain = load(tiny_folder("llava"))
    batch = prepare(plain, plain.processor, user_message("where?", [_picture()]))
    wanted = plain(**batch).logits
    assert torch.equal(load(tiny_folder("llava"), device_map="cpu")(**batch).logits, wanted)
    text = ("embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb")
    places = {f"model.language_model.{part}": "cpu" for part in text} | {"model.language_model.layers.1": "disk"}
    rest = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "lm_head"), "cpu")
    spread = load(tiny_folder("llava"), device_map=places | rest)
    layer = spread.model.language_model.layers[1]
    assert next(layer.parameters()).is_meta
    assert torch.equal(spread(**batch).logits, wanted)
    with mmroute.attach(spread, prune=mmroute.hub.load("prune", "fastv", start_layer=1, vision_keep=0.3)):
        routed = spread(**batch).logits
    with mmroute.attach(plain, prune=mmroute.hub.load("prune", "fastv", start_layer=1, vision_keep=0.3)):
        assert torch.equal(plain(**batch).logits, routed)


def test_quantised_weights_say_what_they_need(copied, monkeypatch):
    config = json.loads((copied / "config.json").read_text())

    def saved_by(method):
        (copied / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))

    saved_by("gptq")
    with pytest.raises(UnsupportedBackbone, match="quantised by 'gptq'; bitsandbytes and torchao can be routed"):
        load(copied)
    saved_by("bitsandbytes")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes weights need bitsandbytes, .*pip install bitsandbytes"):
        load(copied)
    asked = SimpleNamespace(quant_method=SimpleNamespace(value="torchao"))
    with pytest.raises(ConfigError, match="is quantised already"):
        load(copied, quantization=asked)
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="torchao weights need torchao"):
        load(copied, quantization=asked)
    with pytest.raises(MissingExtra, match="device_map needs accelerate"):
        load(copied, device_map="auto")


def _picture():
    from PIL import Image

    return Image.linear_gradient("L").resize((40, 30))
