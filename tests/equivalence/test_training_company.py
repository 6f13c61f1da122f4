"""An attached model in company: copied, shared by threads, under PEFT and under accelerate."""

import copy
import threading
from collections.abc import Iterator

import accelerate
import families
import peft
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from rig import LAYERS, RAGGED, attached, labels, router, stock
from teacher import conversation

import mmroute
from mmroute.errors import UnsupportedCall
from mmroute.prune.fastv import FastV

# PEFT 0.21 asks transformers 5.23 by the name that the latter has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
NAME = "qwen2_5_vl"
SOME = ["qwen2_5_vl", "chameleon", "llava"]
LORA = {"r": 4, "target_modules": r"model\.(language_model\.)?layers\.\d+\.self_attn\.(q_proj|v_proj)"}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """Gradients stay on here."""
    return


def _batch(name=NAME, B=3, seed=1):
    return families.make_inputs(name, stock(name), B, RAGGED if B == 3 else None, seed=seed)


def _own(name=NAME):
    return copy.deepcopy(stock(name))


@torch.no_grad()
def _logits(model, batch):
    return model(**batch).logits


# ---------------------------------------------------------------------- copies


@pytest.mark.parametrize("name", families.EACH)
def test_a_deep_copy_is_equal_and_independent(name):
    batch = _batch(name)
    with attached(name, prune=router()) as routed:
        model = routed.model
        model(**batch, labels=labels(batch)).loss.backward()
        twin = copy.deepcopy(model).eval()  # what a training call leaves must not be in the way
        model.eval()
        wanted = _logits(model, batch)
        assert torch.equal(_logits(twin, batch), wanted)
        other = twin.__dict__["_mmroute"]
        assert other is not routed
        assert other.controller.pruner is twin.mmroute.prune
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(_logits(model, batch), wanted), "the copy runs on the original's weights, or the reverse"
        out = twin.generate(**batch, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        assert out.past_key_values.live_bytes() > 0
        other.detach()
        assert torch.equal(_logits(model, batch), wanted)


def test_a_state_dict_makes_the_same_model():
    batch = _batch()
    with attached(NAME, training=False, prune=router(seed=5)) as routed:
        wanted, state = _logits(routed.model, batch), copy.deepcopy(routed.model.state_dict())
        stock_keys = {key for key in state if not key.startswith("mmroute.")}
    assert stock_keys == set(stock(NAME).state_dict())
    twin = mmroute.attach(families.make(NAME, layers=LAYERS, seed=9), prune=router(seed=6))
    assert not torch.equal(_logits(twin.model, batch), wanted)
    twin.model.load_state_dict(state)
    assert torch.equal(_logits(twin.model, batch), wanted)


def test_two_threads_on_one_model_do_not_meet():
    batches = [_batch(seed=1), _batch(seed=2)]
    greedy = {"max_new_tokens": 3, "do_sample": False}
    with attached(NAME, training=False, prune=router()) as routed:
        model = routed.model

        @torch.no_grad()
        def work(batch):
            with routed.off():
                dense = model(**batch).logits
            return dense, model(**batch).logits, model.generate(**batch, **greedy)

        wanted = [work(batch) for batch in batches]
        found: list[list] = [[], []]
        start = threading.Barrier(2)

        def run(i):
            start.wait(timeout=30)
            found[i] = [work(batches[i]) for _ in range(6)]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    for i in range(2):
        assert len(found[i]) == 6, "the thread died"
        assert all(torch.equal(a, b) for one in found[i] for a, b in zip(one, wanted[i], strict=True))


# ---------------------------------------------------------------------- PEFT


def _lora(model):
    """LoRA with weights that do something; the same for every model of a family."""
    torch.manual_seed(11)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    return wrapped.eval()


@pytest.mark.parametrize("name", SOME)
def test_lora_goes_on_before_or_after(name):
    batch = _batch(name)
    first = _lora(_own(name))
    unrouted = _logits(first, batch)
    before = mmroute.attach(first.get_base_model(), prune=router())
    wanted = _logits(first, batch)
    assert before.trace.calls[0].layers[-1].ran[0][1] < 16
    assert (wanted - unrouted).abs().max() > 1e-3

    model = _own(name)
    routed = mmroute.attach(model, prune=router())
    second = _lora(model)
    assert torch.equal(_logits(second, batch), wanted)
    greedy = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(second.generate(**batch, **greedy), first.generate(**batch, **greedy))

    routed.detach()
    assert torch.equal(_logits(second, batch), unrouted)


@pytest.mark.parametrize("name", SOME)
def test_lora_and_routers_train_together_once_the_parts_are_unfrozen(name):
    batch = _batch(name)
    model = _own(name)
    routed = mmroute.attach(model, prune=router())
    wrapped = _lora(model).train()
    with pytest.warns(UserWarning, match="unfreeze_parts"):
        wrapped(**batch, labels=labels(batch))
    assert not any(p.requires_grad for p in routed.parts.parameters()), "PEFT no longer freezes; drop the advice"
    routed.unfreeze_parts()
    wrapped(**batch, labels=labels(batch)).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in routed.parts.parameters() if p.ndim == 2)
    trained = [n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert sum("lora_A" in n for n in trained) == 2 * LAYERS
    assert all("lora" in n or ".mmroute." in n for n in trained)


@pytest.mark.parametrize("name", SOME)
def test_lora_and_routers_come_back_each_from_its_own_folder(name, tmp_path):
    batch = _batch(name)
    model = _own(name)
    routed = mmroute.attach(model, prune=router(seed=8))
    wrapped = _lora(model)
    wanted = _logits(wrapped, batch)
    wrapped.save_pretrained(tmp_path / "lora")
    routed.save_pretrained(tmp_path / "router")
    assert not any("mmroute" in key for key in peft.utils.load_peft_weights(str(tmp_path / "lora")))

    again = peft.PeftModel.from_pretrained(_own(name), tmp_path / "lora").eval()
    mmroute.from_pretrained(tmp_path / "router", base=again.get_base_model(), prune=router(seed=8))
    assert torch.equal(_logits(again, batch), wanted)

    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(_logits(merged, batch), wanted, rtol=0, atol=1e-5)
    assert routed.trace.calls[0].layers[-1].ran[0][1] < 16


def test_a_wrapped_mmroute_would_train_a_copy_and_raises():
    model = _own()
    mmroute.attach(model, prune=router())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA, modules_to_save=["mmroute"]))
    with pytest.raises(UnsupportedCall, match="modules_to_save"):
        wrapped(**_batch())


def test_nothing_learned_is_nothing_frozen():
    model = _own().train()
    mmroute.attach(model, prune=FastV())
    batch = _batch()
    model(**batch, labels=labels(batch)).loss.backward()  # a warning would fail the test
    assert model.lm_head.weight.grad is not None


# ---------------------------------------------------------------------- accelerate


def _same(one, other):
    """Equal but for rounding: how copied weights lie in memory decides which kernel adds them up (1.3e-6 seen)."""
    return torch.allclose(one, other, rtol=0, atol=1e-5)


def _hook(model, layers):
    for layer in layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))


@pytest.mark.parametrize("name", SOME)
def test_accelerate_hooks_before_and_after(name):
    batch = _batch(name)
    with attached(name, training=False, prune=router()) as routed:
        wanted = _logits(routed.model, batch)

    model = _own(name)
    layers = mmroute.backbones.of(model).text_model(model).layers
    plain = _logits(model, batch)
    _hook(model, layers)
    routed = mmroute.attach(model, prune=router())
    assert _same(_logits(model, batch), wanted)
    routed.detach()
    assert _same(_logits(model, batch), plain)
    for layer in layers:
        remove_hook_from_module(layer)

    routed = mmroute.attach(model, prune=router())
    _hook(model, layers)
    assert _same(_logits(model, batch), wanted)
    with pytest.raises(UnsupportedCall, match="wrapped after attach"):
        routed.detach()
    for layer in layers:
        remove_hook_from_module(layer)
    assert _same(_logits(model, batch), wanted)
    routed.detach()
    assert _same(_logits(model, batch), plain)


def test_offloaded_weights_route_the_same():
    batch, model = _batch(), _own()
    mmroute.attach(model, prune=router())
    wanted = _logits(model, batch)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert next(model.model.language_model.layers[0].parameters()).is_meta
    assert torch.equal(_logits(model, batch), wanted)


# ---------------------------------------------------------------------- Trainer


def test_the_stock_trainer_takes_a_step(tmp_path):
    model, talk = _own(), conversation(NAME, stock(NAME), 3, RAGGED)
    routed = mmroute.attach(model, prune=router())
    whole = {key: value for key, value in talk.whole.items() if key != "position_ids"}
    whole |= {"hop_ids": talk.hop, "generated": talk.generated, "labels": labels(talk.whole)}
    with torch.no_grad():
        wanted = model.train()(**whole).loss
    before = copy.deepcopy(model.state_dict())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        activation_checkpointing=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=[0, 1, 2], data_collator=lambda rows: whole)
    result = trainer.train()
    assert result.training_loss == pytest.approx(float(wanted), abs=1e-5)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in moved if name.startswith("mmroute.")} == {
        f"mmroute.prune.rows.{i}.{kind}" for i in range(1, LAYERS) for kind in ("weight", "bias")
    }
    assert "lm_head.weight" in moved
    assert routed.trace.calls[0].layers[-1].ran[0][1] < 3 * 16
