"""What latent steps cost beyond the positions they enter: `python -m mmroute.bench.latent_time`.

The paper's setting: a prompt of 220 positions with 10 x 10 image tokens, 3 latents with 32 copies each, 7 answer
tokens, batch 1, on a random Qwen2.5-VL text stack; images stand there by their ids alone. In turn, in one process, run
the latent steps, the stock model with the same calls on its own cache (what any implementation must pay), the
unweighted relative, and re-entering the whole prefix at each latent as the relatives' published code does. Peak memory
has a fresh process per way; one of them asks for attention maps. Ends with a card for people and one JSON line.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor

from mmroute import hub
from mmroute.bench import schema
from mmroute.bench.engine_cases import Case, Stack, build, prompt
from mmroute.bench.measure import WALL, interleave, peak_memory_bytes, reset_peak_memory
from mmroute.cache import Chunk
from mmroute.engine.attach import attach
from mmroute.errors import MmrouteError
from mmroute.rollout import Rollout, start

__all__ = ["GOAL", "TOKEN_FORWARDS", "Latent", "Stock", "measure", "measure_peak"]

PROMPT, GRID, LATENTS, COPIES, ANSWER = 220, (10, 10), 3, 32, 7
TOKEN_FORWARDS = PROMPT + LATENTS * (COPIES + 1) + ANSWER - 1
GOAL = 1.15
"""Time over the stock model's same calls, at most."""
STACK = Stack(layers=10, hidden=512, mlp=1376, heads=8)
Way = Literal["vedas", "ivtlr", "stock", "reforward", "maps"]
WAYS: tuple[Way, ...] = ("vedas", "ivtlr", "stock", "reforward")
"""What is timed; `maps` is `reforward` with attention maps, for memory alone."""


def _batch(device: str) -> dict[str, Tensor]:
    return prompt(Case("", STACK, (PROMPT,), GRID[0] * GRID[1], 1.0, 1.0, goal=1.0), device)


class Latent:
    """Prompt, latent steps and answer as mmroute runs them."""

    def __init__(self, name: str, device: str, stack: Stack = STACK) -> None:
        self.think = hub.load("think", name, num_latents=LATENTS, replay_tokens=COPIES)
        self.routed = attach(build(stack, device), think=self.think)
        self.batch = _batch(device)
        self.forwards = 0

    @torch.no_grad()
    def __call__(self) -> None:
        base, family = self.routed.controller.base, self.routed.family
        cache = self.routed.new_cache()
        cache.reserve(TOKEN_FORWARDS)
        cache.next = Chunk(watch=True)
        h = base(**self.batch, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        mask = self.batch["attention_mask"]
        mind = start(
            cache,
            self.think,
            hidden=h,
            modality=cache.meta["modality"].long(),
            valid=mask.bool(),
            positions=self.batch["position_ids"],
            grids=[[GRID]],
            seeds=torch.zeros(1, dtype=torch.long, device=h.device),
        )
        rollout = Rollout(self.routed, self.think, cache, mind, mask)
        mind = rollout.run()
        mask, place, h = rollout.mask, mind.next_position, mind.hidden
        for step in range(ANSWER):
            token = family.head(self.routed.model, h).argmax(-1)
            if step + 1 == ANSWER:
                break
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            h = base(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=(place + step).expand(3, 1, 1),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        self.forwards = cache.trace.token_forwards


class Stock:
    """The stock model with the same positions: on its own cache, or the prefix anew at each latent."""

    def __init__(self, device: str, anew: bool = False, maps: bool = False, stack: Stack = STACK) -> None:
        self.model = build(stack, device)
        if maps:
            self.model.set_attn_implementation("eager")
        self.batch, self.anew, self.maps = _batch(device), anew, maps
        self.forwards = 0

    @torch.no_grad()
    def __call__(self) -> None:
        base = self.model.model
        x = base.get_input_embeddings()(self.batch["input_ids"])
        places, device = self.batch["position_ids"], x.device
        self.forwards = 0

        def enter(x: Tensor, places: Tensor, cache: Any, seen: int) -> Any:
            self.forwards += x.shape[1]
            return base(
                inputs_embeds=x,
                attention_mask=torch.ones(1, seen + x.shape[1], dtype=torch.long, device=device),
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
                output_attentions=self.maps,
            )

        whole, all_places = x, places
        out = enter(x, places, None, 0)
        for _ in range(LATENTS):
            chunk = torch.cat([x[:, 10 : 10 + COPIES], out.last_hidden_state[:, -1:]], 1)
            first = int(all_places.max()) + 1
            new = torch.arange(first, first + COPIES + 1, device=device).expand(3, 1, -1)
            whole, all_places = torch.cat([whole, chunk], 1), torch.cat([all_places, new], 2)
            if self.anew:
                out = enter(whole, all_places, None, 0)
            else:
                out = enter(chunk, new, out.past_key_values, whole.shape[1] - chunk.shape[1])
        for step in range(ANSWER):
            token = self.model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
            if step + 1 == ANSWER:
                break
            seen = whole.shape[1] + step
            place = (all_places.amax(2, keepdim=True) + 1 + step).expand(3, 1, 1)
            out = enter(base.get_input_embeddings()(token[:, None]), place, out.past_key_values, seen)


def _way(name: Way, device: str) -> Latent | Stock:
    if name in ("vedas", "ivtlr"):
        return Latent(name, device)
    return Stock(device, anew=name != "stock", maps=name == "maps")


def measure(rounds: int, warmup: int, device: str = "cpu") -> dict[str, Any]:
    """Times all ways in turn.

    Raises:
        MmrouteError: the latent steps entered another number of positions than they should.
    """
    runs = {name: _way(name, device) for name in WAYS}
    cases: dict[str, Callable[[], None]] = {str(name): run for name, run in runs.items()}
    timings = interleave(cases, rounds, warmup)
    forwards = {name: run.forwards for name, run in runs.items()}
    for name in ("vedas", "ivtlr", "stock"):
        if forwards[name] != TOKEN_FORWARDS:
            raise MmrouteError(f"{name} entered {forwards[name]} positions, {TOKEN_FORWARDS} are due; this is a bug")
    ratio = {
        f"{a}/{b}": dataclasses.asdict(timings.ratio(a, b))
        for a, b in (("vedas", "stock"), ("ivtlr", "stock"), ("vedas", "ivtlr"), ("reforward", "vedas"))
    }
    seconds = {name: dataclasses.asdict(timings.spread(name)) for name in WAYS}
    return {"clock": timings.clock, "token_forwards": forwards, "time_s": seconds, "ratio": ratio}


def measure_peak(name: Way, device: str = "cpu") -> int:
    """Peak memory of the first run of a way in this process, over what was resident before it."""
    run = _way(name, device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    torch.set_num_threads(1)
    reset_peak_memory()
    before = peak_memory_bytes()
    run()
    return peak_memory_bytes() - before


def card(found: dict[str, Any]) -> str:
    """What a person wants to know of a run."""
    out = [
        f"prompt {PROMPT}, {LATENTS} latents with {COPIES} copies, {ANSWER} answer tokens; load {found['load'][0]:.1f}"
    ]
    for name, spread in found["time_s"].items():
        peak = found["peak_memory_bytes"].get(name)
        told = "" if peak is None else f", peak {peak / 1e6:.1f} MB"
        out.append(f"{name:10} {found['token_forwards'][name]:5} positions  {1e3 * spread['median']:8.1f} ms{told}")
    if "maps" in found["peak_memory_bytes"]:
        out.append(f"with attention maps and the prefix anew: peak {found['peak_memory_bytes']['maps'] / 1e6:.1f} MB")
    for name, spread in found["ratio"].items():
        out.append(f"{name:16} {spread['median']:.3f} [{spread['p10']:.3f}, {spread['p90']:.3f}]")
    return "\n".join(out)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the result file.")] = Path("results/latent-time"),
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    warmup: Annotated[int, typer.Option(min=0)] = 3,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, in fresh processes.")] = True,
    device: str = "cpu",
    peak: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Times latent steps against the same number of cached positions on the stock model."""
    if peak:
        typer.echo(measure_peak(peak, device))  # type: ignore[arg-type]
        return
    commit, dirty = schema.commit_of_source()
    began, started = datetime.now(UTC).isoformat(timespec="seconds"), WALL.read()
    load = list(os.getloadavg())
    found = measure(rounds, warmup, device)
    peaks = {}
    for name in (*WAYS, "maps") if memory else ():
        command = [sys.executable, "-m", "mmroute.bench.latent_time", "--peak", name, "--device", device]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks[name] = int(done.stdout.splitlines()[-1])
    told = f"python -m mmroute.bench.latent_time --rounds {rounds} --warmup {warmup}"
    run = schema.run_here(told, commit, dirty, began, WALL.read() - started)
    found = {
        "schema": "latent-time/1",
        "run": dataclasses.asdict(run),
        "machine": dataclasses.asdict(schema.machine_here(device, "float32", "sdpa")),
        "load": [*load, *os.getloadavg()],
        "setting": {
            "stack": dataclasses.asdict(STACK),
            "prompt": PROMPT,
            "grid": list(GRID),
            "latents": LATENTS,
            "copies": COPIES,
            "answer": ANSWER,
            "rounds": rounds,
        },
        **found,
        "peak_memory_bytes": peaks,
        "goal": GOAL,
        "reached": found["ratio"]["vedas/stock"]["median"] <= GOAL,
    }
    schema.write_json(out / "latent-time.json", found)
    typer.echo(card(found))
    typer.echo(json.dumps({name: spread["median"] for name, spread in found["ratio"].items()}))


if __name__ == "__main__":
    typer.run(main)
