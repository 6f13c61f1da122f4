"""A routed model in TRL's SFT trainer, plain and with LoRA, checkpointing and bf16, and on an export of our items."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmroute
from mmroute.cli import app

datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")

COLOURS = ("red", "green", "blue")
LORA = {"r": 4, "target_modules": r"model\.language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


def colours() -> Any:
    """Three conversations about one picture each."""
    rows = [
        {
            "images": [Image.new("RGB", (32, 32), colour)],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": colour}]},
            ],
        }
        for colour in COLOURS
    ]
    return datasets.Dataset.from_list(rows)


def made(model: Any, rows: Any, out: Path, config: dict[str, Any], **options: Any) -> Any:
    """The stock trainer."""
    config = {"bf16": False, "gradient_checkpointing": False, "max_steps": 12, "learning_rate": 5e-3, **config}
    settings = trl.SFTConfig(
        str(out),
        per_device_train_batch_size=3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        max_length=None,
        **config,
    )
    return trl.SFTTrainer(model, settings, train_dataset=rows, processing_class=model.processor, **options)


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_trl_fine_tunes_a_routed_model_on_conversations(tmp_path: Path, tiny_folder: Any) -> None:
    model = mmroute.load(tiny_folder("llava"))
    with mmroute.attach(model, prune=mmroute.hub.load("prune", "fastv", vision_keep=0.4, start_layer=1)) as routed:
        found = losses(made(model, colours(), tmp_path, {}))
        assert routed.trace.calls[0].layers[1].ran[0][1] < 3 * 16
    assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_lora_and_dares_routers_learn_under_checkpointing_and_bf16(name: str, tmp_path: Path, tiny_folder: Any) -> None:
    model = mmroute.load(tiny_folder(name))
    pruner = mmroute.hub.load(
        "prune", "dare", first_layer=1, cutoff_layer=2, variant="l", vision_keep=0.6, text_keep=0.8
    )
    routed = mmroute.attach(model, prune=pruner)
    asked = {"bf16": True, "gradient_checkpointing": True, "learning_rate": 2e-2}
    trainer = made(model, colours(), tmp_path, asked, peft_config=peft.LoraConfig(**LORA))
    routed.unfreeze_parts()  # PEFT froze all that is no adapter
    before = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    found = losses(trainer)
    assert routed.controller.checkpointed == {0, 1, 2}, "nothing was recomputed"
    moved = {key for key, value in trainer.model.named_parameters() if not torch.equal(value, before[key])}
    assert found[-1] < 0.9 * found[0]
    assert all("lora" in key or ".mmroute." in key for key in moved)
    assert sum("lora_B" in key for key in moved) == 2 * 3
    assert any(".mmroute." in key for key in moved)
    ran, new = routed.trace.calls[0].layers[2].ran, routed.trace.calls[0].new
    assert ran[0][1] < new[0][1]


def test_trl_trains_on_exported_items(tmp_path: Path, tiny_folder: Any) -> None:
    for command in (
        f"make --task frozenlake --preset nano --n 3 --format jsonl -o {tmp_path / 'lakes'}",
        f"export {tmp_path / 'lakes'} --to trl -o {tmp_path / 'trl'}",
    ):
        done = CliRunner().invoke(app, ["data", *command.split()])
        assert done.exit_code == 0, done.output
    datasets.disable_progress_bars()
    rows = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "trl"), cache_dir=str(tmp_path / "cache"))
    model = mmroute.load(tiny_folder("llava"))
    with mmroute.attach(model, prune=mmroute.hub.load("prune", "fastv", vision_keep=0.4, start_layer=1)) as routed:
        found = losses(made(model, rows["train"], tmp_path / "out", {"max_steps": 8}))
        assert routed.trace.calls[0].layers[1].ran[0][1] < routed.trace.calls[0].new[0][1]
    assert len(rows["train"]) == 3
    assert found[-1] < 0.8 * found[0]
