"""Every fact of a family, against what the stock model does."""

import copy
import inspect
from types import SimpleNamespace

import families
import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmroute import backbones
from mmroute.errors import InputError, UnsupportedBackbone, UnsupportedCall

EVERY = pytest.mark.parametrize("name", families.NAMES)


def places(family, model, inputs):
    return family.positions(model, inputs["input_ids"], inputs["attention_mask"], inputs.get("image_grid_thw"))


@EVERY
def test_a_model_is_recognised_and_says_where_its_parts_are(name):
    model = families.make(name)
    family = backbones.of(model)
    text = family.text_model(model)
    assert family.name == name
    assert len(text.layers) == 5
    assert text.norm is not None
    assert text.rotary_emb is not None
    assert family.base_model(model) is model.model
    shape = family.shape(model)
    assert (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (64, 5, 4, 2, 16)
    assert (shape.mlp, shape.vocab, shape.itemsize) == (128, 512, 4)
    assert family.shape(model.bfloat16()).itemsize == 2


@EVERY
@torch.no_grad()
def test_queries_and_keys_are_those_that_attention_used(name):
    model = families.make(name)
    family = backbones.of(model)
    used = []

    def spy(module, query, key, value, mask, **kwargs):
        if hasattr(module, "layer_idx"):  # not the vision tower's
            used.append((query.clone(), key.clone()))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    text = family.text_model(model)
    text.config._attn_implementation = "spy"
    entered = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: entered.append((args[0], *kwargs["position_embeddings"])), with_kwargs=True
        )
        for layer in text.layers
    ]
    inputs = families.make_inputs(name, model, 3, [0, 3, 2])
    model(**inputs, position_ids=places(family, model, inputs), use_cache=False)
    for handle in handles:
        handle.remove()
    assert len(used) == len(entered) == 5
    for layer, (x, cos, sin), (query, key) in zip(text.layers, entered, used, strict=True):
        q, k = family.qk(layer, x, cos, sin)
        torch.testing.assert_close(q, query, rtol=0, atol=0)
        torch.testing.assert_close(k, key, rtol=0, atol=0)


@torch.no_grad()
def test_chameleons_large_variant_projects_the_raw_stream():
    model = families.make("chameleon", swin_norm=True)
    family = backbones.of(model)
    layer = family.text_model(model).layers[1]
    assert type(layer).__name__ == "ChameleonSwinDecoderLayer"
    seen = []
    handle = layer.self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    x = torch.randn(1, 4, 64)
    angles = family.text_model(model).rotary_emb(x, torch.arange(4)[None])
    layer(x, position_embeddings=angles)
    handle.remove()
    assert torch.equal(family.normed(layer, x), seen[0])


@EVERY
def test_a_layer_returns_what_the_family_says(name):
    model = families.make(name)
    family = backbones.of(model)
    text = family.text_model(model)
    x = torch.randn(1, 4, 64)
    at = torch.arange(4)[None]
    angles = text.rotary_emb(x, at.expand(3, 1, 4) if name.startswith("qwen") else at)
    out = text.layers[0](x, position_embeddings=angles, attention_mask=None)
    assert isinstance(out, tuple) == family.tuple_out


@EVERY
@pytest.mark.parametrize(("batch", "pads"), [(1, None), (3, [0, 3, 2])])
@torch.no_grad()
def test_positions_are_those_of_stock_generate(name, batch, pads):
    model = families.make(name, layers=1)
    family = backbones.of(model)
    inputs = families.make_inputs(name, model, batch, pads, images=2)
    used = []
    handle = family.text_model(model).rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: used.append(kwargs["position_ids"] if kwargs else args[1]), with_kwargs=True
    )
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    handle.remove()
    ours = places(family, model, inputs)
    real = inputs["attention_mask"].bool()
    stock = used[0].expand_as(ours)
    assert torch.equal(ours[..., real], stock[..., real])
    given = family.positions(
        model,
        inputs["input_ids"],
        inputs["attention_mask"],
        inputs.get("image_grid_thw"),
        inputs.get("mm_token_type_ids"),
    )
    assert torch.equal(ours, given)


@EVERY
@torch.no_grad()
def test_generate_takes_the_positions_made_for_it(name):
    model = families.make(name, layers=2)
    family = backbones.of(model)
    inputs = families.make_inputs(name, model, 2, [0, 3], images=2)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    stock = model.generate(**inputs, **options)
    if name.startswith("qwen"):
        model.model.rope_deltas = None
    at = family.generate_positions(places(family, model, inputs), inputs["attention_mask"])
    explicit = model.generate(**inputs, position_ids=at, **options)
    assert torch.equal(stock.sequences, explicit.sequences)
    torch.testing.assert_close(torch.stack(explicit.logits), torch.stack(stock.logits), rtol=0, atol=1e-5)


@EVERY
@torch.no_grad()
def test_positions_of_text_alone_run_from_zero(name):
    model = families.make(name, layers=1)
    family = backbones.of(model)
    inputs = families.make_inputs(name, model, 2, [0, 3], images=0)
    at = places(family, model, inputs)
    assert at.shape == ((3, 2, 9) if name.startswith("qwen") else (2, 9))
    assert at.reshape(-1, 2, 9)[0].tolist() == [list(range(9)), [0, 0, 0, *range(6)]]


@pytest.mark.parametrize("name", [n for n in families.NAMES if n.startswith("qwen")])
def test_positions_refuse_a_grid_too_few_and_a_video(name):
    model = families.make(name, layers=1)
    family = backbones.of(model)
    inputs = families.make_inputs(name, model, 1, images=2)
    with pytest.raises(InputError, match="24 image positions in the prompt, 16 in image_grid_thw"):
        family.positions(model, inputs["input_ids"], inputs["attention_mask"], inputs["image_grid_thw"][:1])
    with pytest.raises(InputError, match="24 image positions in the prompt, 0 in"):
        family.positions(model, inputs["input_ids"], inputs["attention_mask"])
    inputs["input_ids"][0, 0] = families.VIDEO
    with pytest.raises(InputError, match="video"):
        places(family, model, inputs)


@EVERY
def test_grids_cover_exactly_the_placeholders(name):
    model = families.make(name, layers=1)
    family = backbones.of(model)
    inputs = families.make_inputs(name, model, 2, [0, 3], images=2)
    grids = family.image_grid(model, inputs)
    assert len(grids) == 4
    assert sum(family.lead(model) + rows * columns for rows, columns in grids) == int(
        (inputs["input_ids"] == families.IMAGE).sum()
    )
    if name.startswith("qwen"):
        assert grids == [(4, 4), (2, 4)] * 2
    assert set(family.image_kwargs(inputs)) == set(inputs) - {"input_ids", "attention_mask"}
    text_only = families.make_inputs(name, model, images=0)
    assert family.image_kwargs(text_only) == []
    with pytest.raises(InputError):
        family.image_grid(model, text_only)


@EVERY
def test_vision_ids_are_placeholders_and_written_image_tokens(name):
    model = families.make(name, layers=1)
    ids = backbones.of(model).vision_ids(model)
    codes = list(range(families.FIRST_CODE, families.FIRST_CODE + families.NUM_CODES))
    placeholders = [families.IMAGE, families.VIDEO] if name.startswith("qwen") else [families.IMAGE]
    assert ids == (codes + placeholders if name == "chameleon" else placeholders)


@EVERY
def test_delimiters_surround_images_where_the_family_has_such_tokens(name):
    model = families.make(name, layers=1)
    ids = backbones.of(model).delimiter_ids(model)
    assert ids == ([families.VISION_START, families.VISION_END] if name.startswith("qwen") else [])


@EVERY
@torch.no_grad()
def test_the_eager_function_is_the_familys_own(name):
    model = families.make(name, "eager", layers=1)
    family = backbones.of(model)
    layer = family.text_model(model).layers[0]
    attention = layer.self_attn
    query, key, value = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16)
    out, weights = family.eager(layer)(attention, query, key, value, None, scaling=attention.scaling, dropout=0.0)
    assert out.shape == (1, 6, 4, 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 6))


@torch.no_grad()
def test_unlocked_chameleon_has_the_logits_of_its_head_and_locked_again_the_stock_ones():
    model = families.make("chameleon", layers=2)
    family = backbones.of(model)
    inputs = families.make_inputs("chameleon", model)
    stock = model(**inputs).logits
    codes = family.image_tokens(model)
    assert (stock[..., codes] == torch.finfo(stock.dtype).min).all()
    family.unlock_images(model)
    unlocked = model(**inputs).logits
    assert torch.equal(unlocked, model.lm_head(model.model(**inputs).last_hidden_state))
    assert family.vision_ids(model) == [*codes, families.IMAGE]
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, unlocked)
    family.lock_images(model)
    assert torch.equal(model(**inputs).logits, stock)
    family.lock_images(model)  # nothing to undo is fine
    assert model.model.vocabulary_mapping.image_tokens == codes


def test_only_chameleon_writes_images():
    model = families.make("llava", layers=1)
    with pytest.raises(UnsupportedCall, match="chameleon"):
        backbones.of(model).unlock_images(model)
    backbones.of(model).lock_images(model)


def test_an_unknown_family_is_refused_with_the_list_of_known_ones():
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, bos_token_id=1, eos_token_id=2)
    with pytest.raises(UnsupportedBackbone, match=r"'gpt2'; supported: qwen2_vl .*chameleon .*llava"):
        backbones.of(transformers.GPT2LMHeadModel(config))
    with pytest.raises(UnsupportedBackbone, match="given Linear; pass what from_pretrained returned"):
        backbones.of(torch.nn.Linear(1, 1))
    with pytest.raises(UnsupportedBackbone, match="no language head; load it with AutoModelForImageTextToText"):
        backbones.of(families.make("llava", layers=1).model)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llava", {"sliding_window": 16}),
        ("qwen2_vl", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("qwen2_5_vl", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}),
    ],
)
def test_a_sliding_window_is_refused(name, options):
    with pytest.raises(UnsupportedBackbone, match="sliding window of 16 positions"):
        backbones.of(families.make(name, layers=2, **options))


def test_a_window_that_no_layer_uses_is_fine():
    model = families.make("qwen2_vl", layers=2, use_sliding_window=True, sliding_window=16, max_window_layers=2)
    assert backbones.of(model).name == "qwen2_vl"


def test_quantised_weights_and_foreign_text_models_are_refused():
    model = families.make("llava", layers=1)
    model.config.quantization_config = SimpleNamespace(quant_method="gptq")
    with pytest.raises(UnsupportedBackbone, match=r"quantised \(gptq\)"):
        backbones.of(model)
    model = families.make("llava", layers=1)
    model.config.text_config.model_type = "gemma"
    with pytest.raises(UnsupportedBackbone, match="gemma text model; mistral and llama"):
        backbones.of(model)


def test_the_text_model_of_qwen2_vl_is_written_as_that_of_qwen2_5_vl():
    """So tests that concern text models alone run one of them by default (`families.TWINS`); if not, take it out."""

    def written(name):
        text = backbones.of(model := families.make(name, layers=1)).text_model(model)
        kinds = (type(text), type(text.layers[0]), type(text.layers[0].self_attn))
        return [inspect.getsource(kind).replace("Qwen2VL", "").replace("Qwen2_5_VL", "") for kind in kinds]

    assert written("qwen2_vl") == written("qwen2_5_vl")
