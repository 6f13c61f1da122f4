"""A model of this process as an upstream: one worker thread, a few sessions in turn, one decode step each.

Rating costs nothing here that the answer does not need: the draft's prompt is read once, the rating is taken from that
very session, and the session goes on writing if the draft stays.

Legend: V vocabulary.
"""

import asyncio
import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmroute import reason, recipe
from mmroute.backbones.images import prepare
from mmroute.cost import estimate_flops, estimate_kv_bytes, keep_shares, kv_bytes_per_slot, planned_trace
from mmroute.errors import InputError, MmrouteError
from mmroute.gate.base import Rating
from mmroute.reason import Session
from mmroute.serve.breaker import Breaker
from mmroute.serve.limits import decode_data_image
from mmroute.serve.schema import DONE
from mmroute.serve.settings import Settings, UpstreamSettings
from mmroute.serve.upstreams import Fault, Reply, SessionReply, SessionUpstream
from mmroute.think.base import Thinker
from mmroute.trace import Trace

__all__ = ["FirstToken", "LocalReply", "LocalUpstream", "SessionRater", "TrainedRater"]

log = logging.getLogger(__name__)

SESSIONS = 4


class SessionRater(Protocol):
    """Rates a query from the draft's prompt, read and cached, before the first thought."""

    artifact: str
    """Named in headers and logs, so that a threshold has a provenance."""

    def rate(self, session: Session, logits: Tensor) -> Rating:
        """May enter positions; must leave the session as it was.

        Args:
            logits: (1, V) of the prompt's last position.
        """

    def start(self, budget: float) -> float | None:
        """The threshold of a share for a policy's first decisions, if it is known from calibration."""


class FirstToken:
    """Without training: how sure the draft is of its first token.

    Source: the maximum softmax probability, as any log-probability baseline, read before anything is written.
    Deviates: PRP trains a rating; this one is what a pair without a trained rater starts with, and no good judge of a
        long chain of thought.
    """

    artifact = "first-token"

    def rate(self, session: Session, logits: Tensor) -> Rating:
        sure = float(logits[0].float().softmax(-1).max())
        return Rating(1 - sure, sure)

    def start(self, budget: float) -> float | None:
        return None


class TrainedRater:
    """A folder of `mmroute train prp` on the draft it was trained on."""

    def __init__(self, folder: Path, model: Any) -> None:
        from mmroute.gate.prp import Prp

        self.gate = Prp.load(folder, model)
        self.artifact = f"prp:{self.gate.facts['artifact']}"

    def rate(self, session: Session, logits: Tensor) -> Rating:
        return self.gate.one(self.gate.rate_session(session), 0)

    def start(self, budget: float) -> float | None:
        return self.gate.start(budget)


@dataclass
class _Job:
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
    loop: asyncio.AbstractEventLoop
    out: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    go: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)

    def emit(self, item: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(self.out.put_nowait, item)
        except RuntimeError:  # the loop has closed: nobody listens any more
            self.gone.set()


class LocalUpstream(SessionUpstream):
    """Loads its model in `start`, answers until `aclose`."""

    def __init__(
        self, role: str, settings: UpstreamSettings, all_: Settings, rater: SessionRater | None = None
    ) -> None:
        plain = settings.model_copy(update={"tools": False, "json_mode": False, "logprobs": False})
        super().__init__(role, plain, Breaker(all_.circuit))
        self.rater = rater
        self.shape: Any = None
        self.counterpart: LocalUpstream | None = None
        """The local target, whose cost of the same answer is worked out beside a draft's own."""
        self._limits = all_.limits
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._stack = ExitStack()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._routed: Any = None
        self._think: Thinker | None = None
        self.steps = 0
        """Decode steps taken; stops growing when nobody listens."""

    def start(self) -> None:
        """Loads the model; seconds to minutes.

        Raises:
            MmrouteError: it cannot be loaded or routed.
        """
        if self._thread is not None:
            return
        made = recipe.read(self.settings.recipe)
        self._routed, self._think = self._stack.enter_context(recipe.equip(self.settings.model, made))
        self.shape = self._routed.controller.shape
        self._thread = threading.Thread(target=self._work, name=f"mmroute-{self.role}", daemon=True)
        self._thread.start()

    @property
    def artifact(self) -> str:
        return "" if self.rater is None else self.rater.artifact

    def first_threshold(self, budget: float) -> float | None:
        return None if self.rater is None else self.rater.start(budget)

    def load_rater(self, folder: Path | None) -> None:
        self.rater = FirstToken() if folder is None else TrainedRater(folder, self._routed.model)

    async def ready(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    async def aclose(self) -> None:
        if self._thread is not None:
            self._stopping = True
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = None
            self._stack.close()

    async def open(self, body: dict[str, Any], stream: bool, request_id: str) -> Reply:
        return self.begin(body, request_id, park=False)

    def begin(self, body: dict[str, Any], request_id: str, *, park: bool, trace: bool = False) -> "LocalReply":
        if (body.get("n") or 1) != 1:
            raise Fault("refused", f"n={body['n']}: a local model writes one answer", status=400, ours=True)
        stops = body.get("stop") or []
        job = _Job(
            messages=self._messages(body["messages"]),
            limit=body.get("max_completion_tokens") or body.get("max_tokens"),
            temperature=body.get("temperature") or 0.0,
            top_p=body.get("top_p") or 1.0,
            seed=body.get("seed") or 0,
            stops=[stops] if isinstance(stops, str) else list(stops),
            id=f"chatcmpl-{request_id}",
            park=park,
            trace=trace,
            loop=asyncio.get_running_loop(),
        )
        self._jobs.put(job)
        return LocalReply(job, self.name)

    def _messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Chat parts as the model's processor takes them; images are data addresses by now."""
        out = []
        for message in messages:
            content = message.get("content")
            parts: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
            blocks: list[dict[str, Any]] = []
            for part in parts:
                if part["type"] == "text":
                    blocks.append({"type": "text", "text": part["text"]})
                elif part["type"] == "image_url":
                    blocks.append({"type": "image", "image": decode_data_image(part["image_url"]["url"], self._limits)})
                else:
                    raise Fault(
                        "refused", f"a local model reads text and images, not {part['type']!r}", status=400, ours=True
                    )
            out.append({"role": message["role"], "content": blocks})
        return out

    # ------------------------------------------------------------------ the worker thread

    @torch.no_grad()
    def _work(self) -> None:
        running: deque[Any] = deque()
        while not self._stopping:
            while len(running) < SESSIONS:
                try:
                    job = self._jobs.get(block=not running)
                except queue.Empty:
                    break
                if job is None:
                    return
                running.appendleft(_Turns(self, job))  # a new prompt comes first: somebody waits for its rating
            turns = running.popleft()
            try:
                if next(turns.steps, _OVER) is not _OVER:
                    running.append(turns)
            except (MmrouteError, ValueError) as error:
                ours = isinstance(error, InputError)
                turns.job.emit(
                    Fault("refused" if ours else "failed", str(error), status=400 if ours else 500, ours=ours)
                )
            except Exception as error:  # a thread's boundary: the other sessions go on
                log.exception("%s: a session failed", self.role)
                turns.job.emit(Fault("failed", f"{self.role}: {type(error).__name__}", status=500))


_OVER = object()


class _Turns:
    """One job in the worker: each `next(steps)` is one forward call."""

    def __init__(self, upstream: LocalUpstream, job: _Job) -> None:
        self.up, self.job = upstream, job
        self.steps = self._run()

    def _run(self) -> Iterator[None]:
        up, job, routed, think = self.up, self.job, self.up._routed, self.up._think
        assert think is not None
        limit = job.limit if job.limit is not None else think.max_new_tokens
        if limit < 1 or job.temperature < 0 or not 0 < job.top_p <= 1:
            raise InputError("max_tokens >= 1, temperature >= 0 and top_p in (0, 1] are needed")
        if job.gone.is_set():
            return
        batch = prepare(routed.model, routed.processor, [job.messages])
        session = Session(routed, reserve=limit)
        routed.full_trace = job.trace
        logits = session.append(batch)
        routed.full_trace = False
        prompt = int(batch["attention_mask"].sum())
        rated = None if up.rater is None else up.rater.rate(session, logits)
        flops = estimate_flops(session.trace_of(0)).total
        job.emit(("rated", rated, prompt, float(flops)))
        yield
        while job.park and not job.go.is_set():
            if job.gone.is_set():
                return
            # Alone, there is nothing better to do than to wait; beside others, their steps take the time.
            job.go.wait(0.001)
            yield
        writer = _Writer(routed, think, job)
        finish = "length"
        for _ in range(limit):
            ended, hop = writer.take(logits)
            if ended:
                finish = "stop"
                break
            if len(writer.ids) == limit:
                break
            yield
            if job.gone.is_set():
                return
            if hop >= 0:
                session.close_hop([hop])
            logits = session.step(writer.last, [writer.hop])
            up.steps += 1
        writer.flush()
        job.emit(("done", finish, prompt, len(writer.ids), self._report(session, batch)))

    def _report(self, session: Session, batch: dict[str, Tensor]) -> dict[str, Any]:
        up, routed = self.up, self.up._routed
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

    def __init__(self, routed: Any, think: Thinker, job: _Job) -> None:
        self.tokenizer = routed.processor.tokenizer
        self.ends = reason._end_ids(routed)
        self.think, self.job = think, job
        self.draw = torch.Generator().manual_seed(job.seed)
        self.ids: list[int] = []
        self.hop = 1
        self.sent = ""
        self.last: Tensor

    def take(self, logits: Tensor) -> tuple[bool, int]:
        """Draws the next token; whether the answer ended with it, and the hop that it closes (-1: none)."""
        self.last = reason._sample(logits, self.job.temperature, self.job.top_p, [self.draw])
        value = int(self.last)
        self.ids.append(value)
        if value in self.ends:
            return True, -1
        closed = -1
        if len(self.ids) > 1 and self.think.starts_hop(self.tokenizer.decode([value])):
            closed, self.hop = self.hop, self.hop + 1
        return self._say(), closed

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
            self.job.emit(("text", text[len(self.sent) :]))
            self.sent = text

    def flush(self) -> None:
        if not any(stop in self.text for stop in self.job.stops):
            self._say(last=True)


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


class LocalReply(SessionReply):
    """One conversation with a local model, as the gateway sees it."""

    def __init__(self, job: _Job, model: str) -> None:
        self._job, self._model = job, model
        self._created = int(time.time())
        self.prompt_tokens = 0
        self.prefill_flops = 0.0
        self.report: dict[str, Any] | None = None

    async def rated(self) -> Rating | None:
        item = await self._job.out.get()
        if isinstance(item, Fault):
            raise item
        _, rated, self.prompt_tokens, self.prefill_flops = item
        return rated

    def resume(self) -> None:
        self._job.go.set()

    def _chunk(self, delta: dict[str, Any], finish: str | None = None, **rest: Any) -> bytes:
        choices = [] if "usage" in rest else [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]
        head = {"id": self._job.id, "object": "chat.completion.chunk", "created": self._created, "model": self._model}
        return json.dumps({**head, "choices": choices, **rest}).encode()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if not self._job.park:
            await self.rated()  # the prompt has been read: only now is there something to begin with
        yield self._chunk({"role": "assistant", "content": ""})
        while True:
            item = await self._job.out.get()
            if isinstance(item, Fault):
                raise item
            if item[0] == "text":
                yield self._chunk({"content": item[1]})
            elif item[0] == "done":
                _, finish, prompt, written, self.report = item
                yield self._chunk({}, finish)
                usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
                yield self._chunk({}, usage=usage)
                yield DONE
                return

    async def aclose(self) -> None:
        self._job.gone.set()
        self._job.go.set()
