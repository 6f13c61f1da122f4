"""Codes to pixels: equal to the VQGAN's own decoder written out, and found in a folder of either release's format."""

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from vqgan import decoded, vqgan_weights

import mmroute
from mmroute.backbones.vq import CHECKPOINT, PREFIX, PictureDecoder, find_decoder
from mmroute.errors import CheckpointMismatch


@pytest.fixture(scope="module")
def model():
    return families.make("chameleon", layers=1)


@torch.no_grad()
def test_pixels_are_those_of_the_vqgans_own_decoder(model):
    vq, config = model.model.vqmodel, model.config.vq_config
    weights = vqgan_weights(config)
    decoder = PictureDecoder(vq)
    decoder.load(weights)
    codes = torch.randint(0, families.NUM_CODES, (2, 4, 3))
    z = vq.post_quant_conv(vq.quantize.embedding.weight[codes].permute(0, 3, 1, 2))
    want = decoded(weights, z, len(config.channel_multiplier), config.num_res_blocks)
    got = decoder.pixels(codes)
    assert got.shape == (2, 3, 32, 24)
    assert float(want.abs().max()) > 0.1
    torch.testing.assert_close(got, want.clamp(-1, 1), rtol=0, atol=1e-4)
    picture = decoder.pictures(codes)[1]
    assert picture.size == (24, 32)
    assert picture.getpixel((5, 7)) == tuple(((got[1, :, 7, 5] + 1) * 127.5).round().int().tolist())


@pytest.mark.parametrize("release", ["anole", "chameleon"])
def test_a_folder_of_a_release_gives_its_decoder(release, tiny_folder, tmp_path, caplog):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder("chameleon").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert mmroute.load(folder).picture_decoder is None
    caplog.clear()
    config = mmroute.load(folder).config.vq_config
    weights = vqgan_weights(config)
    if release == "anole":
        stored = load_file(folder / "model.safetensors")
        both = {**stored, **{f"{PREFIX}{name}": value for name, value in weights.items()}}
        save_file(both, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        (folder / CHECKPOINT).parent.mkdir()
        state = {f"decoder.{name}": value for name, value in weights.items()} | {"encoder.conv_in.bias": torch.ones(2)}
        torch.save({"state_dict": state}, folder / CHECKPOINT)
    loaded = mmroute.load(folder)
    ours = [record for record in caplog.records if record.name.startswith("mmroute")]
    assert not ours, "the decoder's weights are no weights too many"
    assert not [name for name in loaded.state_dict() if "decoder" in name], "no part of the stock model"
    want = PictureDecoder(loaded.model.vqmodel)
    want.load(weights)
    codes = torch.arange(16).view(1, 4, 4)
    assert torch.equal(loaded.picture_decoder.pixels(codes), want.pixels(codes))


def test_weights_that_do_not_fit_and_broken_files_are_named(model, tmp_path):
    decoder, weights = PictureDecoder(model.model.vqmodel), vqgan_weights(model.config.vq_config)
    del weights["up.0.block.0.conv1.bias"]
    with pytest.raises(CheckpointMismatch, match=r"up\.3\.block\.0\.conv1\.bias is missing in the checkpoint"):
        decoder.load(weights)
    (tmp_path / CHECKPOINT).parent.mkdir()
    (tmp_path / CHECKPOINT).write_bytes(b"not a torch file")
    with pytest.raises(CheckpointMismatch, match=r"vqgan\.ckpt is no torch file"):
        find_decoder(tmp_path, model)
