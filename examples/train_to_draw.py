"""Teach your Anole or Chameleon to think in pictures (MVoT): LoRA, with token discrepancy beside cross-entropy.

pip install "mmroute[train]"; python examples/train_to_draw.py FOLDER_OR_HUB_ID OUT_FOLDER
"""

import sys
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

import mmroute
from mmroute.train.discrepancy import code_distances, token_discrepancy


def row(model: Any, sample: Any) -> dict[str, Tensor]:
    """Prompt, every hop with its picture, answer. What is learned holds pictures as their codes."""
    prompt = "<image>" * len(sample.prompt_images) + sample.question + model.processor.tokenizer.sep_token
    thought = "".join(f" {hop.text}<image>" for hop in sample.hops) + f" {sample.answer}"
    shown = [sample.images[i] for i in [*sample.prompt_images, *(hop.image for hop in sample.hops)]]
    as_given = {"return_for_text_completion": True, "return_tensors": "pt"}
    batch = model.processor(text=prompt + thought, images=shown, **as_given)
    given = model.processor(text=prompt, images=shown[: len(sample.prompt_images)], **as_given)["input_ids"].shape[1]
    ids = batch["input_ids"]
    ids[ids == model.config.image_token_id] = model.get_image_tokens(batch["pixel_values"]).reshape(-1).to(ids.dtype)
    return {"input_ids": ids, "labels": torch.where(torch.arange(ids.shape[1]) < given, -100, ids)}


class Drawing(Trainer):
    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        base = model.get_base_model()  # stock code hides the logits of codes: take them from the head itself
        states, right = base.model(input_ids=inputs["input_ids"]).last_hidden_state[:, :-1], inputs["labels"][:, 1:]
        logits, right = base.lm_head(states[right != -100]).float(), right[right != -100]
        code_of = base.model.vocabulary_mapping.img2bpe
        is_code = right[:, None] == (codes := torch.tensor([code_of[i] for i in sorted(code_of)], device=right.device))
        drawn = token_discrepancy(logits[is_code.any(1)][:, codes], is_code.nonzero()[:, 1], self.apart)
        return F.cross_entropy(logits, right) + 0.1 * drawn


def main(model_name: str, out: str, task: str = "frozenlake", steps: int = 100) -> list[float]:
    model = mmroute.load(model_name)
    data = [row(model, s) for s in mmroute.hub.load("tasks", task, hop_images="observed").samples("train", steps)]
    settings = TrainingArguments(out, max_steps=steps, per_device_train_batch_size=1, learning_rate=2e-4, report_to=[],
                                 logging_steps=1, save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
                                 use_cpu=not torch.cuda.is_available())  # fmt: skip
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    trainer = Drawing(tuned, settings, train_dataset=data, data_collator=lambda rows: rows[0])
    trainer.apart = code_distances(model.model.vqmodel).to(model.device)
    trainer.train()
    tuned.merge_and_unload().save_pretrained(out)
    model.processor.save_pretrained(out)
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    main(*sys.argv[1:3])
