"""What one process of test_trainer.py runs: the stock Trainer on a routed model; rank 0 writes what happened as JSON.

torchrun --nproc-per-node 2 worker.py ddp|fsdp2 OUT FAMILY, or python worker.py one OUT FAMILY
"""

import json
import sys
from pathlib import Path
from typing import Any

import families
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as sharded
from rig import LAYERS, labels, router
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

import mmroute

PADS = [0, 3, 0, 3]
STEPS, RATE = 6, 0.02


def made(name: str) -> Any:
    """An attached model with learned routers, towers frozen."""
    model = families.make(name, layers=LAYERS)
    routed = mmroute.attach(model, prune=router())
    model.requires_grad_(False)
    routed.controller.text.layers.requires_grad_(True)
    routed.unfreeze_parts()
    return model


def rows(name: str, model: Any) -> list[dict[str, torch.Tensor]]:
    """The global batch, row by row; each has one image."""
    batch = families.make_inputs(name, model, len(PADS), PADS)
    batch["labels"] = labels(batch)
    return [{key: value.unflatten(0, (len(PADS), -1))[i] for key, value in batch.items()} for i in range(len(PADS))]


def together(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([item[key] for item in items]) for key in items[0]}


def with_trainer(model: Any, data: list[dict[str, torch.Tensor]], out: Path, share: int) -> list[float]:
    """Losses that the stock Trainer logs; each process takes `share` rows a step."""
    settings = TrainingArguments(
        str(out),
        max_steps=STEPS,
        per_device_train_batch_size=share,
        learning_rate=RATE,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    trainer = Trainer(model, settings, train_dataset=data, data_collator=together)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def with_fsdp2(model: Any, data: list[dict[str, torch.Tensor]]) -> list[float]:
    """The Trainer's steps by hand on a sharded model: accelerate shards on accelerators only."""
    model.train()
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.__dict__["_mmroute"].controller.text.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert {type(p).__name__ for p in model.mmroute.parameters()} == {"DTensor"}
    optimiser = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=RATE)
    targets = sum(int((row["labels"][:, 1:] != -100).sum()) for row in data)
    batch, losses = together(data[rank::world]), []
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = model(**batch, num_items_in_batch=targets).loss  # its part of the mean over the global batch
        (loss * world).backward()  # gradients are averaged over the processes
        optimiser.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(float(whole))
    return losses


def main(way: str, out: Path, name: str) -> None:
    model = made(name)
    data = rows(name, model)
    if way == "fsdp2":
        dist.init_process_group("gloo")
        losses = with_fsdp2(model, data)
        sharded.save(get_model_state_dict(model), checkpoint_id=out / "shards")  # each process writes what it holds
    else:
        losses = with_trainer(model, data, out, len(data) if way == "one" else len(data) // 2)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if way == "one":
        torch.save(model.state_dict(), out / "whole.pt")
    if world == 1 or dist.get_rank() == 0:
        (out / f"{way}.json").write_text(json.dumps({"world": world, "losses": losses}))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
