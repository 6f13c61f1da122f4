"""What each of two gloo processes runs for test_training_distributed.py; rank 0 prints one JSON line.

The same global batch is trained for some steps by this process alone, and then split over two processes.
"""

import copy
import json
import os
import sys
from pathlib import Path

import families
import torch
import torch.distributed as dist
from rig import LAYERS, labels, router
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mmroute
from mmroute.engine import saving

PADS = [0, 3, 0, 3]
STEPS = 8


def made(name: str) -> torch.nn.Module:
    """An attached model, its unused weights frozen, in training mode."""
    model = families.make(name, layers=LAYERS)
    mmroute.attach(model, prune=router())
    batch = families.make_inputs(name, model, 4, PADS)
    model.train()
    model(**batch, labels=labels(batch)).loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is None:  # towers have weights that nothing reads; routers must not
            assert not key.startswith("mmroute."), f"{key} takes no part in training"
            parameter.requires_grad_(False)
        parameter.grad = None
    return model


def mine(batch: dict, rank: int, world: int) -> dict:
    """This rank's rows; each row has as many images."""
    return {key: value.unflatten(0, (world, -1))[rank] for key, value in batch.items()}


def train(model: torch.nn.Module, batch: dict, world: int) -> list[float]:
    """Losses of the global batch, step by step."""
    optimiser = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    losses = []
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = model(**batch, labels=labels(batch)).loss
        loss.backward()
        optimiser.step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses


def sharded(model: torch.nn.Module, world: int) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.__dict__["_mmroute"].controller.text.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def saved(shards: torch.nn.Module, start: torch.nn.Module, rank: int) -> bool:
    """Whether sharded routers, saved by all ranks, come back whole."""
    folder = Path(os.environ["MMROUTE_TEST_FOLDER"]) / f"rank{rank}"
    shards.__dict__["_mmroute"].save_pretrained(folder)
    whole = {name: value.full_tensor() for name, value in shards.mmroute.state_dict().items()}
    twin = copy.deepcopy(start)
    saving.load(twin.__dict__["_mmroute"], folder)
    return all(torch.equal(whole[name], value) for name, value in twin.mmroute.state_dict().items())


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world == 2, f"{world} processes; accelerate launch --cpu may run one"
    found: dict = {"world": world}
    for name in sys.argv[1:]:
        start = made(name)
        batch = families.make_inputs(name, start, 4, PADS)
        part = mine(batch, rank, world)
        whole = train(copy.deepcopy(start), batch, 1)
        ddp = DistributedDataParallel(copy.deepcopy(start), find_unused_parameters=False)
        found[name] = {"one": whole, "ddp": train(ddp, part, world)}
        shards = sharded(copy.deepcopy(start), world)
        kinds = {type(p).__name__ for p in shards.mmroute.parameters()}
        assert kinds == {"DTensor"}, "the parts were not sharded with the model"
        found[name]["fsdp"] = train(shards, part, world)
        found[name]["saved"] = saved(shards, start, rank)
        recomputed = sharded(copy.deepcopy(start), world)
        recomputed.activation_checkpointing_enable()
        found[name]["fsdp checkpointed"] = train(recomputed, part, world)
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
