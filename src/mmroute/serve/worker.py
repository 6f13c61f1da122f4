"""What the thread of a local model does with one conversation: read, rate, wait, write; one forward call at a time."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmroute.backbones.images import prepare
from mmroute.cost import estimate_flops, estimate_kv_bytes, keep_shares, kv_bytes_per_slot, planned_trace
from mmroute.decoding import end_ids, sample
from mmroute.errors import InputError
from mmroute.session import Session
from mmroute.think.base import Thinker
from mmroute.trace import Trace

if TYPE_CHECKING:
    from mmroute.serve.local import LocalUpstream

__all__ = ["Job", "Turns"]


@dataclass
class Job:
    """One conversation, from the event loop to the worker and back."""

    messages: list[dict[str, Any]]
    limit: int | None
    temperature: float
    top_p: float
    seed: int
    stops: list[str]
    id: str
    park: bool
    """Wait after the rating for `go` or `gone`."""
    trace: bool
    template: dict[str, Any]
    """Variables of the chat template."""
    top_logprobs: int | None
    """Alternatives named beside each token's log-probability; None is no log-probabilities."""
    loop: asyncio.AbstractEventLoop
    out: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    go: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)

    def emit(self, item: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(self.out.put_nowait, item)
        except RuntimeError:  # the loop has closed: nobody listens any more
            self.gone.set()


class Turns:
    """One job in the worker: each `next(steps)` is one forward call."""

    def __init__(self, upstream: "LocalUpstream", job: Job) -> None:
        self.up, self.job = upstream, job
        self.steps = self._run()

    def _run(self) -> Iterator[None]:
        up, job, routed, think = self.up, self.job, self.up.routed, self.up.think
        assert think is not None
        limit = job.limit if job.limit is not None else think.max_new_tokens
        if limit < 1 or job.temperature < 0 or not 0 < job.top_p <= 1:
            raise InputError("max_tokens >= 1, temperature >= 0 and top_p in (0, 1] are needed")
        if job.gone.is_set():
            return
        batch = prepare(routed.model, routed.processor, [job.messages], job.template)
        # Room is made for what may be written, so it must not be more than the model can ever read.
        room = routed.model.config.get_text_config(decoder=True).max_position_embeddings
        limit = min(limit, room - batch["input_ids"].shape[1] + 1)  # the last token is not read
        session = Session(routed, reserve=limit)
        routed.full_trace = job.trace
        logits = session.append(batch)
        routed.full_trace = False
        prompt = int(batch["attention_mask"].sum())
        writer = _Writer(routed, think, job)
        writing = self._write(session, logits, writer, limit)
        rater, finish = up.rater, None
        for _ in range(0 if rater is None else rater.after):  # its rating goes out first, whatever it has read by then
            yield
            if job.gone.is_set():
                return
            finish = next(writing)
            if finish is not None:
                break
        rated = None if rater is None else rater.rate(session, logits)
        flops = estimate_flops(session.trace_of(0)).total
        job.emit(("rated", rated, prompt, float(flops)))
        yield
        while job.park and not job.go.is_set():
            if job.gone.is_set():
                return
            # Alone, there is nothing better to do than to wait; beside others, their steps take the time.
            job.go.wait(0.001)
            yield
        writer.release()
        while finish is None:
            if job.gone.is_set():
                return
            finish = next(writing)
            if finish is None:
                yield
        writer.flush()
        job.emit(("done", finish, prompt, len(writer.ids), self._report(session, batch)))

    def _write(self, session: Session, logits: Tensor, writer: "_Writer", limit: int) -> Iterator[str | None]:
        """One token and the call behind it, again and again; says why it ends, None until then."""
        for _ in range(limit):
            ended, hop = writer.take(logits)
            if ended:
                yield "stop"
                return
            if len(writer.ids) == limit:
                break
            if hop >= 0:
                session.close_hop([hop])
            logits = session.step(writer.last, [writer.hop])
            self.up.steps += 1
            yield None
        yield "length"

    def _report(self, session: Session, batch: dict[str, Tensor]) -> dict[str, Any]:
        up, routed = self.up, self.up.routed
        routed.full_trace = self.job.trace
        trace = session.trace_of(0)
        routed.full_trace = False
        report: dict[str, Any] = {
            "flops": float(estimate_flops(trace).total),
            "kv_bytes": estimate_kv_bytes(trace),
            "keep": keep_shares(trace),
        }
        if up.counterpart is not None and up.counterpart.shape is not None:
            plan = planned_trace(up.counterpart.shape, trace.calls[0].new, decode_steps=len(trace.calls) - 1)
            report["flops_target"] = float(estimate_flops(plan).total)
        grids = routed.family.image_grid(routed.model, batch) if self.job.trace else []
        if len(grids) == 1:  # the page lays patches over one picture
            report["view"] = _view(trace, grids[0], (routed.controller.table[batch["input_ids"][0]] == 1).tolist())
        return report


class _Writer:
    """What is written: ids, hops as `reason.answer_many` cuts them, and text as soon as it is whole."""

    def __init__(self, routed: Any, think: Thinker, job: Job) -> None:
        self.tokenizer = routed.processor.tokenizer
        self.ends = end_ids(routed)
        self.think, self.job = think, job
        self.draw = torch.Generator().manual_seed(job.seed)
        self.ids: list[int] = []
        self.hop = 1
        self.sent = ""
        self.last: Tensor
        self._entries: list[dict[str, Any]] = []
        """Log-probabilities of tokens whose text has not gone out yet."""
        self._decoded = ""
        self._waiting: list[Any] | None = []
        """What may not go out before the rating."""

    def take(self, logits: Tensor) -> tuple[bool, int]:
        """Draws the next token; whether the answer ended with it, and the hop that it closes (-1: none)."""
        self.last = sample(logits, self.job.temperature, self.job.top_p, [self.draw])
        value = int(self.last)
        self.ids.append(value)
        if value in self.ends:
            return True, -1
        if self.job.top_logprobs is not None:
            self._entries.append(self._entry(logits, value, self.job.top_logprobs))
        closed = -1
        if len(self.ids) > 1 and self.think.starts_hop(self.tokenizer.decode([value])):
            closed, self.hop = self.hop, self.hop + 1
        return self._say(), closed

    def _entry(self, logits: Tensor, value: int, num: int) -> dict[str, Any]:
        """A token as OpenAI's `logprobs.content` has it, from the logits before any temperature."""
        logp = logits[0].float().log_softmax(-1)
        before, self._decoded = self._decoded, self.text
        # What the token added to the text: a tokenizer of words sets a blank before it that its own name has not.
        own = self._decoded.removeprefix(before) if self._decoded.startswith(before) else ""
        best = logp.topk(min(num, len(logp)))
        named = [(i, self.tokenizer.decode([i])) for i in best.indices.tolist()]
        top = [_token(text, p) for (_, text), p in zip(named, best.values.tolist(), strict=True)]
        return {**_token(own or self.tokenizer.decode([value]), float(logp[value])), "top_logprobs": top}

    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def _say(self, last: bool = False) -> bool:
        """Emits what is whole; True where a stop sequence ends the answer."""
        text = self.text
        for stop in self.job.stops:
            at = text.find(stop)
            if at >= 0:
                self._emit(text[:at])
                return True
        held = 0 if last else max((_overlap(text, stop) for stop in self.job.stops), default=0)
        if not last and text.endswith("\ufffd"):
            return False  # half a character: the rest comes with the next token
        self._emit(text[: len(text) - held])
        return False

    def _emit(self, text: str) -> None:
        if text.startswith(self.sent) and len(text) > len(self.sent):
            item = ("text", text[len(self.sent) :], self._entries)
            self.sent, self._entries = text, []
            if self._waiting is None:
                self.job.emit(item)
            else:
                self._waiting.append(item)

    def release(self) -> None:
        """The rating is out: what has been written goes out too, and what follows at once."""
        for item in self._waiting or ():
            self.job.emit(item)
        self._waiting = None

    def flush(self) -> None:
        if not any(stop in self.text for stop in self.job.stops):
            self._say(last=True)


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _view(trace: Trace, grid: tuple[int, int], vision: list[bool]) -> dict[str, Any]:
    """Which patches of the prompt's picture ran, and the bytes held in the end, layer by layer."""
    patch = {column: number for number, column in enumerate(i for i, v in enumerate(vision) if v)}
    last, slot = trace.calls[-1].layers, kv_bytes_per_slot(trace.shape)
    return {
        "grid": list(grid),
        "kept": [[patch[c] for c in (layer.kept or [[]])[0] if c in patch] for layer in trace.calls[0].layers],
        "kv": [layer.stored[0] * slot for layer in last],
    }


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that may be the beginning of a stop sequence."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
