"""The draft rates itself and the target after reading the prompt, before its first token.

What says the ratings (`form`) is put behind the prompt, on the draft's own cache: a learned position (`_suffix`), or
words that a tuned draft writes (`_digits`). Then the cache is cropped by it, so the draft's answer is bit for bit the
one it would have given without a gate, and nothing is read twice.

Source: PRP (arXiv 2606.30217): draft and joint rating learning.
Deviates: the paper's ratings are generated tokens of a fine-tuned draft (form `tokens`); the default reads them at one
extra position, so its reasoning cannot be harmed. K = 10 levels and the expected level as the rating are our reading.

Legend: B rows, R ratings (draft, target), K levels.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from mmroute import backbones
from mmroute.backbones.load import load as load_model
from mmroute.config import options, resolved
from mmroute.errors import CheckpointMismatch, ConfigError, InputError, MmrouteError
from mmroute.gate import _card
from mmroute.gate._calibrate import Calibration, calibration
from mmroute.gate._digits import Digits
from mmroute.gate._manifest import FORMAT, MANIFEST, WEIGHTS, Manifest, first_threshold, folder_of, verifier_of
from mmroute.gate._suffix import Suffix
from mmroute.gate._verify import Verifier
from mmroute.gate._words import LEVELS
from mmroute.gate.base import Cost, Evidence, Gate, Needs, Rating, Ratings, score_of
from mmroute.train import delta

if TYPE_CHECKING:
    from mmroute.session import Session

__all__ = ["Prp"]


@dataclass(frozen=True)
class Seat:
    """One conversation of a batch that the draft has read."""

    session: "Session"
    row: int


def stacked(picked: Sequence[tuple[Ratings, int]]) -> Ratings:
    """Single rows of several ratings of one rater as ratings of their own."""

    def column(name: str) -> Any:
        values = [getattr(ratings, name) for ratings, _ in picked]
        return None if values[0] is None else np.stack([v[row] for v, (_, row) in zip(values, picked, strict=True)])

    names = ("score", "draft", "target", "draft_probs", "target_probs")
    return Ratings(**{name: column(name) for name in names}, overhead=picked[0][0].overhead)


def expected(probs: Float[Tensor, "B R K"]) -> Float[Tensor, "B R"]:
    """The rating: the mean level, from 0 to 1."""
    return probs @ torch.linspace(0, 1, probs.shape[-1], device=probs.device, dtype=probs.dtype)


def bucket_prob(probs: Float[Tensor, "B R K"]) -> Float[Tensor, "B R"]:
    """The paper's order: the most likely level, ties by its probability; from 0 to 1."""
    mass, level = probs.max(-1)
    return (level + mass) / probs.shape[-1]


class Prp(Gate):
    """Ratings from the draft's own prefill."""

    needs: Needs = "prefill"
    trained: ClassVar[bool] = True

    @options
    class Config:
        form: Literal["suffix", "tokens"] = "suffix"
        """A learned position that is read in this process, or digits that the draft writes, for any server."""
        levels: Annotated[int, Field(ge=2, le=20)] = 10
        """K, from "never" to "always"; digits are ten."""
        num_ratings: Literal[1, 2] = 2
        """1 rates the draft alone (draft rating learning), 2 the target too (joint)."""
        lora_rank: Annotated[int, Field(ge=1)] = 8
        """Of the LoRA at the rating position; under `tokens` of the one that `train.backbone: lora` merges."""
        score: Literal["advantage", "draft", "target", "joint"] = "advantage"
        """What is ranked by; see `score_of`."""
        reading: Literal["expected", "bucket_prob"] = "expected"
        """Mean level, or the most likely level with ties by its probability."""
        calibration: Literal["platt", "isotonic", "none"] = "platt"
        """How each rating is mapped to a probability."""
        cost_weight: Annotated[float, Field(ge=0)] = 0.0
        """lambda: success that one unit of cost must buy."""
        decide_after: Annotated[int, Field(ge=0)] = 0
        """Tokens of its answer that the draft writes before it rates; a shorter answer is rated at its end."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if self.config.num_ratings == 1 and self.config.score != "draft":
            raise ConfigError(f"gate.prp.score {self.config.score!r} needs num_ratings 2; with 1 it is 'draft'")
        if self.config.form == "tokens" and self.config.levels != LEVELS:
            raise ConfigError(f"gate.prp.levels is {LEVELS} where ratings are digits, given {self.config.levels}")
        if self.config.decide_after:
            if self.config.form == "tokens":
                raise ConfigError(
                    "gate.prp.decide_after is 0 where the draft writes its rating before its first thought"
                )
            self.needs = "early"
        self.model: Any = None
        self._shape: Any = None
        self.reader: Suffix | Digits | None = None
        """What says the ratings behind a prompt; only the one of `suffix` has weights of its own."""
        self.calibrators: list[Calibration] = []
        self.facts: dict[str, Any] = {}
        """What else the artifact says: pair, splits, quantiles, figures."""
        self._read: Manifest | None = None

    def bind(self, model: Any, seed: int = 0) -> "Prp":
        """Sits on a draft, with fresh weights where its form has any.

        Raises:
            UnsupportedBackbone: form `tokens`, and a vocabulary that cannot write a rating.
        """
        config, self.model, self._shape = self.config, model, backbones.of(model).shape(model)
        if config.form == "tokens":
            self.reader = Digits.of(model.processor, config.num_ratings)
        else:
            self.reader = Suffix(model, config.levels, config.num_ratings, config.lora_rank, seed)
        return self

    @property
    def steps(self) -> int:
        return self.config.decide_after

    # ------------------------------------------------------------------ rating

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        """Ratings of conversations that the draft has read; each session is rated in one call.

        Raises:
            InputError: a query whose session is not a `Seat`.
        """
        seats: list[Seat] = []
        for each in evidence:
            if not isinstance(each.session, Seat):
                raise InputError(f"prp rates on the draft's session; query {each.query.id!r} has none")
            seats.append(each.session)
        found: dict[int, Ratings] = {}
        for seat in seats:
            if id(seat.session) not in found:
                found[id(seat.session)] = self.rate_session(seat.session)
        return stacked([(found[id(seat.session)], seat.row) for seat in seats])

    @torch.no_grad()
    def rate_session(self, session: "Session") -> Ratings:
        """Ratings of every row of a session where it stands: behind its prompts, or `decide_after` tokens later.

        What is put behind them runs unrouted and is forgotten again: cache, trace and positions are as before.

        Raises:
            ConfigError: no weights, or a session on another model.
        """
        if session.routed.model is not self.model:
            raise ConfigError("this rater belongs to another draft than the session's; bind or load it on that model")
        assert session.mask is not None and session.next_position is not None
        calls = session.cache.trace.calls
        before, reader = len(calls), self._reader()
        probs = self.levels(session.cache, session.mask, session.next_position, session.axes, is_routed=True).exp()
        session.cache.crop(-reader.columns)
        del calls[before:]
        lengths = session.mask.sum(1).tolist()
        return self.ratings(probs, int(sum(lengths) / len(lengths)))

    def levels(
        self, cache: Any, mask: Int[Tensor, "B N"], after: Int[Tensor, " B"], axes: int, *, is_routed: bool = False
    ) -> Float[Tensor, "B R K"]:
        """Log-probabilities of the levels behind what a cache holds, which holds more afterwards; see `_behind`."""
        return self._reader()(self.model, cache, mask, after, axes, is_routed=is_routed)

    def ratings(self, probs: Float[Tensor, "B R K"], context: int) -> Ratings:
        """Ratings from the levels' probabilities.

        Args:
            probs: what the rater said.
            context: prompt positions, for the overhead.
        """
        read = expected if self.config.reading == "expected" else bucket_prob
        raw = read(probs.double()).cpu().numpy()
        each = [c(raw[:, i]) for i, c in enumerate(self.calibrators)] if self.calibrators else list(raw.T)
        target = each[1] if self.config.num_ratings == 2 else None
        reader = self._reader()
        table = probs.cpu().numpy()
        return Ratings(
            score=score_of(self.config.score, each[0], target, cost_weight=self.config.cost_weight, cost_gap=1.0),
            draft=each[0],
            target=target,
            draft_probs=table[:, 0],
            target_probs=table[:, 1] if target is not None else None,
            overhead=Cost(
                calls=reader.steps,
                tokens_in=reader.columns,
                tokens_cached=context,
                tokens_out=reader.steps,
                flops=reader.flops(self._shape, context),
            ),
        )

    def start(self, budget: float) -> float | None:
        """The threshold of a share on the calibration split, for a policy's first decisions; None without one."""
        return first_threshold(self.facts, budget)

    @property
    def verifier(self) -> Verifier | None:
        """The second look's fit; None where the artifact was made without one."""
        return verifier_of(self.facts)

    def _reader(self) -> Suffix | Digits:
        if self.reader is None:
            raise ConfigError("this gate has no weights; train it with `mmroute train prp`, or load a trained folder")
        return self.reader

    def calibrate(self, raw: Sequence[np.ndarray], success: Sequence[np.ndarray]) -> None:
        """Fits one map per rating, on a split of its own."""
        self.calibrators = [calibration(self.config.calibration, r, y) for r, y in zip(raw, success, strict=True)]

    # ------------------------------------------------------------------ files

    def save(self, folder: Path) -> str:
        """Writes `rater.json`, and `rater.safetensors` where the form has weights; returns the artifact's id.

        Raises:
            MmrouteError: the folder cannot be written.
        """
        weights = self._weights()
        text = self._text(weights)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in ((WEIGHTS, weights), (MANIFEST, text)):
                if not data:
                    continue
                beside = folder / f".{name}.part"
                beside.write_bytes(data)
                beside.replace(folder / name)
        except OSError as error:
            raise MmrouteError(
                f"could not write {folder}: {error.strerror or error}; free space or choose another"
            ) from error
        return hashlib.sha256(weights + text).hexdigest()[:16]

    def _weights(self) -> bytes:
        reader = self._reader()
        if not isinstance(reader, Suffix):
            return b""
        return tensor_bytes({k: v.detach().cpu().contiguous() for k, v in reader.state_dict().items()})

    def _text(self, weights: bytes) -> bytes:
        """`rater.json`; of a rater that was read and not changed since, as it was read, so that it keeps its id."""
        facts = {key: value for key, value in self.facts.items() if key != "artifact"}
        config, base, digest = resolved(self.config), fingerprint(self.model), hashlib.sha256(weights).hexdigest()
        read = self._read
        if read is not None and resolved(Prp(**read.config).config) == config:
            now = (base, digest, self.calibrators, facts)
            if (read.base, read.weights, read.calibrators, read.facts) == now:
                return read.text
        maps = [c.to_dict() for c in self.calibrators]
        whole = {"format": FORMAT, "config": config, "base": base, "weights": digest, "calibrators": maps, **facts}
        return (json.dumps(whole, indent=1) + "\n").encode()

    def save_pretrained(self, folder: str | Path, results: Iterable[str | Path] | None = None) -> str:
        """Writes what `save` writes, with a model card where results are given; returns the artifact's id.

        Args:
            folder: where to.
            results: result files of kind `gate/1` or `gate-eval/1` of this very rater, for the card.

        Raises:
            ConfigError: a result of another rater.
            MmrouteError: the folder cannot be written.
        """
        artifact = self.save(Path(folder))
        if results is not None:
            _card.write(Path(folder), results)
        return artifact

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what `save_pretrained` writes, with a model card; see `gate._card.push`."""
        return _card.push(self, repo_id, **options)

    @classmethod
    def from_pretrained(cls, name: str | Path, draft: Any = None) -> "Prp":
        """A trained rater on its draft, from a folder, a bundled name or the Hub.

        Args:
            name: of the rater; on the Hub `owner/name`.
            draft: a loaded model, or a folder, Hub id or bundled name; None is the one that the rater names.

        Raises:
            CheckpointMismatch: as `load`; or there is no such rater, or no such draft.
        """
        folder = folder_of(name)
        if draft is None:
            draft = Manifest.read(folder).drafted_for
            if draft is None:
                raise CheckpointMismatch(f"{name}: {MANIFEST} names no draft that is as it was trained; pass draft=")
        return cls.load(folder, load_model(draft) if isinstance(draft, str | Path) else draft)

    @classmethod
    def load(cls, folder: Path, model: Any) -> "Prp":
        """A trained rater on its draft.

        Raises:
            CheckpointMismatch: files are missing or broken, or the draft is not the one it was trained on.
        """
        found = Manifest.read(folder)
        try:
            weights = b"" if found.is_written else (folder / WEIGHTS).read_bytes()
            state = read_tensors(weights) if weights else {}
        except (OSError, SafetensorError) as error:
            raise CheckpointMismatch(f"{folder}: not a rater ({error}); `mmroute train prp` writes one") from None
        if hashlib.sha256(weights).hexdigest() != found.weights:
            raise CheckpointMismatch(f"{folder}: {WEIGHTS} is not the file that {MANIFEST} was written with")
        if fingerprint(model) != found.base:
            raise CheckpointMismatch(
                f"{folder}: trained on the draft {found.pair.get('draft', 'without a name')!r} with weights "
                f"{found.base[:12]}, this model ({model.config.name_or_path or 'without a name'}) has "
                f"{fingerprint(model)[:12]}; load the draft it belongs to, or train a rater for this one"
            )
        try:
            made = cls(**found.config).bind(model)
            if isinstance(made.reader, Suffix):
                made.reader.load_state_dict(state)
        except (ConfigError, RuntimeError) as error:
            raise CheckpointMismatch(
                f"{folder}: {MANIFEST} and {WEIGHTS} do not fit this version of mmroute ({error}); train it again"
            ) from None
        made.calibrators, made._read = found.calibrators, found
        made.facts = {**found.facts, "artifact": found.id_with(weights)}
        return made

    def one(self, ratings: Ratings, index: int) -> Rating:
        """One query's rating with the expected costs of both models, as policies take it."""
        draft, target = self.facts.get("costs", (0.0, 1.0))
        return ratings.one(index, draft, target)


def fingerprint(model: Any) -> str:
    """SHA-256 of the text model's weights: what a draft must be for a rater to fit it."""
    return delta.fingerprint(backbones.of(model).text_model(model).state_dict())
