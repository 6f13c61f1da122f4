"""Fine-tune a routed model with the stock Trainer: it learns to answer from the positions that are left.

pip install "mmroute[train]"; python examples/train_with_trainer.py FOLDER_OR_HUB_ID OUT_FOLDER
"""

import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Trainer, TrainingArguments

import mmroute
from mmroute.backbones.images import prepare, user_message


def example(model: Any, colour: str) -> dict[str, Tensor]:
    """Prompt and answer in one row; only the answer is a target."""
    noise = np.random.default_rng(0).integers(0, 60, (56, 56, 3))
    noise[..., ("red", "green", "blue").index(colour)] += 180
    messages = user_message("Which colour?", [Image.fromarray(noise.astype(np.uint8))])
    batch = prepare(model, model.processor, messages)
    tokenizer = model.processor.tokenizer
    answer = tokenizer(colour + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt")["input_ids"]
    prompt = batch["input_ids"]
    batch["input_ids"] = torch.cat([prompt, answer], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = (batch["input_ids"] == model.config.image_token_id).long()
    batch["labels"] = torch.cat([torch.full_like(prompt, -100), answer], 1)
    # What the model writes runs every layer, in training as when it answers: say which positions that is.
    batch["generated"] = batch["labels"] != -100
    return batch


def main(model_name: str, out: str, steps: int = 30) -> list[float]:
    model = mmroute.load(model_name)
    data = [example(model, colour) for colour in ("red", "green", "blue")]
    settings = TrainingArguments(out, max_steps=steps, per_device_train_batch_size=1, learning_rate=1e-3, seed=0,
                                 logging_steps=1, save_strategy="no", report_to=[], remove_unused_columns=False,
                                 use_cpu=not torch.cuda.is_available(), disable_tqdm=True)  # fmt: skip
    with mmroute.attach(model, prune=mmroute.prune.FastV(vision_keep=0.4)):
        trainer = Trainer(model, settings, train_dataset=data, data_collator=lambda rows: rows[0])
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:3])
