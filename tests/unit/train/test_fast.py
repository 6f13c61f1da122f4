"""The fast pass of the small model gives the numbers of the stock classes."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmroute.errors import ConfigError
from mmroute.tasks._texts import BOS, IMAGE, VISION_END, VISION_START, VOCABULARY
from mmroute.train.fast import Positions, encode_tiles, run_text
from mmroute.train.small_model import Shape, build

SIDE, FIRST, AFTER = 3, 4, 20
TOLERANCE = {"rtol": 0, "atol": 1e-5}  # fp32, other order of summation


@pytest.fixture(scope="module")
def model():
    model = build(Shape(layers=3, vision_depth=2), VOCABULARY, seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # fresh norms are ones and biases zeros, which would hide that they are used
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name or "ln_q" in name else 0.0, 0.3)
    return model


@pytest.fixture(scope="module")
def pictures():
    """Tiles (2, side * side, 28, 28, 3) of two pictures, and what the image processor makes of them."""
    tiles = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 28, 28, 3), dtype=np.uint8)
    images = [Image.fromarray(t.transpose(0, 2, 1, 3, 4).reshape(SIDE * 28, SIDE * 28, 3)) for t in tiles]
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 784 * 256})
    return torch.tensor(tiles.reshape(-1, 28, 28, 3), dtype=torch.float32), processor(images, return_tensors="pt")


@torch.no_grad()
def test_tiles_encoded_alone_are_the_stock_tower_s_vision_tokens(model, pictures):
    tiles, processed = pictures
    stock = model.model.visual(processed["pixel_values"], grid_thw=processed["image_grid_thw"]).pooler_output
    torch.testing.assert_close(encode_tiles(model, tiles, torch.float32), stock, **TOLERANCE)


@torch.no_grad()
def test_hidden_states_and_closed_form_positions_are_the_stock_forward_s(model, pictures):
    tiles, processed = pictures
    word = VOCABULARY.index
    ids = torch.randint(8, 300, (2, FIRST + SIDE**2 + AFTER), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, FIRST - 1], ids[:, FIRST + SIDE**2] = word(BOS), word(VISION_START), word(VISION_END)
    ids[:, FIRST : FIRST + SIDE**2] = word(IMAGE)
    stock = model(input_ids=ids, mm_token_type_ids=(ids == word(IMAGE)).int(), output_hidden_states=True, **processed)
    x = model.model.language_model.embed_tokens(ids)
    x[:, FIRST : FIRST + SIDE**2] = encode_tiles(model, tiles, torch.float32).view(2, SIDE**2, -1)
    places = Positions(FIRST, SIDE, ids.shape[1], x.device).ids
    last, tapped = run_text(model, x, places, tap=2)
    torch.testing.assert_close(model.lm_head(last), stock.logits, **TOLERANCE)
    torch.testing.assert_close(tapped, model.model.language_model.norm(stock.hidden_states[2]), **TOLERANCE)


def test_gradients_are_the_stock_forward_s(model):
    ids = torch.randint(8, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    goal = torch.randn(2, 12, len(VOCABULARY), generator=torch.Generator().manual_seed(1))
    grads = []
    for fast in (True, False):
        model.zero_grad()
        x = model.model.language_model.embed_tokens(ids)
        if fast:
            logits = model.lm_head(run_text(model, x, torch.arange(12).expand(3, -1))[0])
        else:
            logits = model(inputs_embeds=x, position_ids=torch.arange(12).expand(3, 2, -1)).logits
        (logits * goal).mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, ours in grads[0].items():
        torch.testing.assert_close(ours, grads[1][name], msg=name, **TOLERANCE)


def test_a_tower_whose_tokens_see_their_neighbours_is_refused(model):
    model.model.visual.fullatt_block_indexes = [0]
    try:
        with pytest.raises(ConfigError, match="windows of one tile"):
            encode_tiles(model, torch.zeros(1, 28, 28, 3), torch.float32)
    finally:
        model.model.visual.fullatt_block_indexes = []
