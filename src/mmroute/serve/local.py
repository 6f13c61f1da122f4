"""A model of this process as an upstream: one worker thread, a few sessions in turn, one decode step each.

Rating costs nothing here that the answer does not need: the draft's prompt is read once, the rating is taken from that
very session, and the session goes on writing if the draft stays.
"""

import asyncio
import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mmroute import recipe
from mmroute.errors import ConfigError, InputError, MmrouteError
from mmroute.gate._words import SWITCH
from mmroute.gate.base import Rating
from mmroute.serve.breaker import Breaker
from mmroute.serve.limits import decode_data_image
from mmroute.serve.schema import DONE
from mmroute.serve.session_raters import FirstToken, SessionRater, TrainedRater
from mmroute.serve.settings import Settings, UpstreamSettings
from mmroute.serve.upstreams import Fault, Reply, SessionReply, SessionUpstream
from mmroute.serve.worker import Job, Turns
from mmroute.think.base import LatentThinker, LookingThinker, Thinker

__all__ = ["SESSIONS", "LocalReply", "LocalUpstream"]

log = logging.getLogger(__name__)

SESSIONS = 4
_TOP_LOGPROBS = 20
_COLDEST = 1e-6


class LocalUpstream(SessionUpstream):
    """Loads its model in `start`, answers until `aclose`."""

    def __init__(
        self, role: str, settings: UpstreamSettings, all_: Settings, rater: SessionRater | None = None
    ) -> None:
        """
        Raises:
            ConfigError: its recipe cannot be read, or its thoughts cannot be streamed.
        """
        self._recipe = recipe.read(settings.recipe)
        _check(role, self._recipe)
        plain = settings.model_copy(update={"tools": False, "json_mode": False})
        super().__init__(role, plain, Breaker(all_.circuit))
        self.rater = rater
        self.shape: Any = None
        self.counterpart: LocalUpstream | None = None
        """The local target, whose cost of the same answer is worked out beside a draft's own."""
        self._limits = all_.limits
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._stack = ExitStack()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.routed: Any = None
        self.think: Thinker | None = None
        self.steps = 0
        """Decode steps taken; stops growing when nobody listens."""

    def start(self) -> None:
        """Loads the model; seconds to minutes.

        Raises:
            MmrouteError: it cannot be loaded or routed.
        """
        if self._thread is not None:
            return
        self.routed, self.think = self._stack.enter_context(recipe.equip(self.settings.model, self._recipe))
        self.shape = self.routed.controller.shape
        self._thread = threading.Thread(target=self._work, name=f"mmroute-{self.role}", daemon=True)
        self._thread.start()

    @property
    def artifact(self) -> str:
        return "" if self.rater is None else self.rater.artifact

    def first_threshold(self, budget: float) -> float | None:
        return None if self.rater is None else self.rater.start(budget)

    def load_rater(self, name: str | Path | None) -> None:
        self.rater = FirstToken() if name is None else TrainedRater(name, self.routed.model)

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
        job = Job(
            messages=self._messages(body["messages"]),
            limit=body.get("max_completion_tokens") or body.get("max_tokens"),
            temperature=_temperature(body),
            top_p=body.get("top_p") or 1.0,
            seed=(body.get("seed") or 0) % 2**63,  # as many as a generator takes
            stops=[stops] if isinstance(stops, str) else list(stops),
            id=f"chatcmpl-{request_id}",
            park=park,
            trace=trace,
            template=_template(body),
            top_logprobs=_top_logprobs(body),
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
                running.appendleft(Turns(self, job))  # a new prompt comes first: somebody waits for its rating
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


def _temperature(body: dict[str, Any]) -> float:
    """Greedy where dividing by it would leave no numbers."""
    given = float(body.get("temperature") or 0.0)
    return 0.0 if 0 <= given < _COLDEST else given


def _template(body: dict[str, Any]) -> dict[str, Any]:
    """Of `chat_template_kwargs` the switch that asks for a rating: the others could be words of the processor's own."""
    return {SWITCH: True} if (body.get("chat_template_kwargs") or {}).get(SWITCH) else {}


def _top_logprobs(body: dict[str, Any]) -> int | None:
    num = body.get("top_logprobs") or 0
    if isinstance(num, bool) or not isinstance(num, int) or not 0 <= num <= _TOP_LOGPROBS:
        raise Fault("refused", f"top_logprobs is 0 to {_TOP_LOGPROBS}, given {num!r}", status=400, ours=True)
    return num if body.get("logprobs") else None


def _check(role: str, made: recipe.Recipe) -> None:
    """
    Raises:
        ConfigError: its thoughts hold more than words, and a stream of words is all that an answer is here.
    """
    think = made.build("think")
    if think.draws or isinstance(think, LookingThinker | LatentThinker):
        raise ConfigError(
            f"{role}.recipe: {made.name} thinks in pictures, boxes or latents, and the gateway streams words alone; "
            "give a recipe that thinks in text (dare-lh, none), or ask this one by `mmroute ask` or `routed.answer`"
        )


class LocalReply(SessionReply):
    """One conversation with a local model, as the gateway sees it."""

    def __init__(self, job: Job, model: str) -> None:
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

    def _chunk(
        self, delta: dict[str, Any], finish: str | None = None, logprobs: dict[str, Any] | None = None, **rest: Any
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        choices = [] if "usage" in rest else [choice]
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
                _, text, entries = item
                yield self._chunk({"content": text}, logprobs={"content": entries} if entries else None)
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
