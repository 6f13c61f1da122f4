"""A routed model in Transformers' trainer, with LoRA, checkpointing and bf16; the files for accelerate."""

import copy
import re
from pathlib import Path
from typing import Any

import families
import peft
import pytest
import torch
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from rig import LAYERS, RAGGED, labels, router, stock

import mmroute

NAMES = ("qwen2_5_vl", "llava")
RECIPES = Path(mmroute.__file__).parent / "recipes" / "accelerate"
LORA = {"r": 4, "target_modules": r"model\.language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"}
# PEFT 0.21 asks transformers 5.23 by the name that the latter has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def _trained(name: str, tmp_path: Path, lora: bool, **options: Any) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """Losses, what moved, and the model."""
    model = copy.deepcopy(stock(name))
    routed = mmroute.attach(model, prune=router())
    torch.manual_seed(3)
    trained = peft.get_peft_model(model, peft.LoraConfig(**LORA)) if lora else model
    routed.unfreeze_parts()
    before = {k: v.clone() for k, v in trained.named_parameters()}
    batch = families.make_inputs(name, model, 3, RAGGED)
    batch["labels"] = labels(batch)
    settings = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = transformers.Trainer(trained, settings, train_dataset=[0, 1, 2], data_collator=lambda rows: dict(batch))
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    moved = {k: v for k, v in trained.named_parameters() if not torch.equal(v, before[k])}
    return losses, moved, routed


@pytest.mark.parametrize("name", NAMES)
def test_lora_and_routers_learn_in_the_trainer_and_checkpointing_changes_nothing(name: str, tmp_path: Path) -> None:
    plain, moved, routed = _trained(name, tmp_path, lora=True)
    assert plain[-1] < plain[0]
    assert all("lora" in name or ".mmroute." in name for name in moved)
    assert sum("lora_B" in name for name in moved) == 2 * LAYERS
    assert sum(".mmroute." in name for name in moved) >= LAYERS - 1
    assert routed.trace.calls[0].layers[-1].ran[0][1] < 3 * 16
    assert _trained(name, tmp_path, lora=True, activation_checkpointing=True)[0] == plain


@pytest.mark.parametrize("name", NAMES)
def test_bf16_learns_the_same_within_its_precision(name: str, tmp_path: Path) -> None:
    exact, _, _ = _trained(name, tmp_path, lora=False)
    rough, moved, routed = _trained(name, tmp_path, lora=False, bf16=True)
    assert rough[0] == pytest.approx(exact[0], rel=0.05)
    assert rough[-1] < rough[0]
    assert any(name.startswith("mmroute.") for name in moved)
    assert all(p.dtype == torch.float32 for p in routed.parts.parameters())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    assert config.mixed_precision == "bf16"
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if path.stem == "deepspeed":
        assert config.deepspeed_config["zero_stage"] == 2


@pytest.mark.parametrize("name", families.NAMES)
def test_the_file_for_shards_names_the_decoder_layer_of_each_family_and_accelerate_wraps_those_alone(name: str) -> None:
    text = (RECIPES / "fsdp2.yaml").read_text()
    model = stock(name)
    with mmroute.attach(model, prune=router()) as routed:
        layers = list(routed.controller.text.layers)
    (kind,) = {type(layer).__name__ for layer in layers}
    assert re.search(rf"\b{kind}\b", text)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[kind]
    )
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [module for module in model.modules() if policy(module)] == layers


def test_there_are_files_for_accelerate() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {"ddp", "ddp-4-nodes", "deepspeed", "fsdp2"}
