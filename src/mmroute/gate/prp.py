"""The draft rates itself and the target after reading the prompt, before its first token.

One soft token is put behind the prompt, on the draft's own cache; a small LoRA acts at that position only; one linear
head reads both ratings off it. Then the cache is cropped by that position, so the draft's answer is bit for bit the one
it would have given without a gate, and nothing is read twice.

Source: PRP (arXiv 2606.30217): draft and joint rating learning; activated LoRA (arXiv 2504.12397) for the form.
Deviates: the paper's ratings are generated tokens of a fine-tuned draft; here they are read at one extra position, so
its reasoning cannot be harmed. K = 10 levels and the expected level as the rating are our reading.

Legend: B rows, D hidden, R ratings (draft, target), K levels.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from mmroute import backbones
from mmroute.config import options, resolved
from mmroute.cost import pairs, position_macs
from mmroute.errors import CheckpointMismatch, ConfigError, InputError, MmrouteError
from mmroute.gate._calibrate import Calibration, calibration
from mmroute.gate.base import Cost, Evidence, Gate, Needs, Rating, Ratings, score_of
from mmroute.train import delta

if TYPE_CHECKING:
    from mmroute.session import Session

__all__ = ["Prp"]

FORMAT = "prp/1"
_SCALE = 2.0
"""LoRA's alpha over its rank."""


@dataclass(frozen=True)
class Seat:
    """One conversation of a batch that the draft has read."""

    session: "Session"
    row: int


class Rater(nn.Module):
    """What is learned: the soft token, the LoRA and the head."""

    def __init__(self, model: Any, levels: int, ratings: int, rank: int, seed: int = 0) -> None:
        """Fresh weights, which rate everything alike.

        Args:
            model: the draft; it is not changed, and nothing of it is kept.
            levels: K.
            ratings: R: 1 rates the draft alone.
            rank: of the LoRA.
            seed: of the weights; the global random state is left as it was.
        """
        super().__init__()
        text = backbones.of(model).text_model(model)
        width = text.config.hidden_size
        draw = torch.Generator().manual_seed(seed)
        spread = float(text.embed_tokens.weight.detach().float().std())
        self.levels, self.ratings = levels, ratings
        self.soft = nn.Parameter(spread * torch.randn(width, generator=draw))
        self.head = nn.utils.skip_init(nn.Linear, width, ratings * levels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, linear in _linears(text):
            key = name.replace(".", "/")  # a parameter's name has no dots
            random = torch.randn(rank, linear.in_features, generator=draw)
            self.down[key] = nn.Parameter(random / linear.in_features**0.5)
            self.up[key] = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.to(next(text.parameters()).device)

    @contextmanager
    def _acting(self, text: Any) -> Iterator[None]:
        """The LoRA adds to every linear layer of the text model, until the block ends."""

        def hook(key: str) -> Any:
            def add(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
                x = args[0]
                down, up = self.down[key].to(x.dtype), self.up[key].to(x.dtype)
                return out + _SCALE * F.linear(F.linear(x, down), up)

            return add

        handles = [linear.register_forward_hook(hook(name.replace(".", "/"))) for name, linear in _linears(text)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(
        self, model: Any, cache: Any, mask: Int[Tensor, "B M"], positions: Tensor, **routing: Any
    ) -> Float[Tensor, "B R K"]:
        """Log-probabilities of the levels, read at one position behind what the cache holds.

        Args:
            model: the draft.
            cache: its cache after the prompt; it holds one column more afterwards.
            mask: of the prompt and of the new column.
            positions: of the new column, (B, 1) or (3, B, 1).
            routing: keywords of an attached model.
        """
        family = backbones.of(model)
        text = family.text_model(model)
        embedding = text.embed_tokens.weight
        soft = self.soft.to(embedding.dtype).expand(mask.shape[0], 1, -1)
        with self._acting(text):
            out = family.base_model(model)(
                inputs_embeds=soft,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **routing,
            )
        return self.read(out.last_hidden_state[:, -1])

    def read(self, state: Float[Tensor, "B D"]) -> Float[Tensor, "B R K"]:
        """Log-probabilities of the levels from the state at the soft token."""
        logits = self.head(state.to(self.head.weight.dtype))
        return logits.view(-1, self.ratings, self.levels).float().log_softmax(-1)

    def flops(self, shape: Any, context: int) -> float:
        """What one rating costs on a prompt of this many positions: one position, the LoRA and the head."""
        lora = sum(p.numel() for group in (self.down, self.up) for p in group.values())
        attention = 2 * shape.layers * shape.heads * shape.head_dim * pairs(1, context)
        return 2.0 * (shape.layers * position_macs(shape) + attention + lora + self.head.weight.numel())


def expected(probs: Float[Tensor, "B R K"]) -> Float[Tensor, "B R"]:
    """The rating: the mean level, from 0 to 1."""
    return probs @ torch.linspace(0, 1, probs.shape[-1], device=probs.device, dtype=probs.dtype)


def bucket_prob(probs: Float[Tensor, "B R K"]) -> Float[Tensor, "B R"]:
    """The paper's order: the most likely level, ties by its probability; from 0 to 1."""
    mass, level = probs.max(-1)
    return (level + mass) / probs.shape[-1]


def _linears(text: Any) -> list[tuple[str, nn.Linear]]:
    return [(name, part) for name, part in text.layers.named_modules() if isinstance(part, nn.Linear)]


class Prp(Gate):
    """Ratings from the draft's own prefill."""

    needs: Needs = "prefill"
    trained: ClassVar[bool] = True

    @options
    class Config:
        levels: Annotated[int, Field(ge=2, le=20)] = 10
        """K, from "never" to "always"."""
        num_ratings: Literal[1, 2] = 2
        """1 rates the draft alone (draft rating learning), 2 the target too (joint)."""
        lora_rank: Annotated[int, Field(ge=1)] = 8
        """Of the LoRA that acts at the rating position."""
        score: Literal["advantage", "draft", "target", "joint"] = "advantage"
        """What is ranked by; see `score_of`."""
        reading: Literal["expected", "bucket_prob"] = "expected"
        """Mean level, or the most likely level with ties by its probability."""
        calibration: Literal["platt", "isotonic", "none"] = "platt"
        """How each rating is mapped to a probability."""
        cost_weight: Annotated[float, Field(ge=0)] = 0.0
        """lambda: success that one unit of cost must buy."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if self.config.num_ratings == 1 and self.config.score != "draft":
            raise ConfigError(f"gate.prp.score {self.config.score!r} needs num_ratings 2; with 1 it is 'draft'")
        self.model: Any = None
        self.rater: Rater | None = None
        self.calibrators: list[Calibration] = []
        self.facts: dict[str, Any] = {}
        """What else the artifact says: pair, splits, quantiles, figures."""

    def bind(self, model: Any, seed: int = 0) -> "Prp":
        """Sits on a draft with fresh weights."""
        self.model = model
        self.rater = Rater(model, self.config.levels, self.config.num_ratings, self.config.lora_rank, seed)
        return self

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
        picked = [(found[id(seat.session)], seat.row) for seat in seats]

        def column(name: str) -> Any:
            values = [getattr(ratings, name) for ratings, _ in picked]
            return None if values[0] is None else np.stack([v[row] for v, (_, row) in zip(values, picked, strict=True)])

        names = ("score", "draft", "target", "draft_probs", "target_probs")
        return Ratings(**{name: column(name) for name in names}, overhead=picked[0][0].overhead)

    @torch.no_grad()
    def rate_session(self, session: "Session") -> Ratings:
        """Ratings of every row of a session that has read its prompts and written nothing.

        One position runs unrouted behind the prompt and is forgotten again: cache, trace and positions are as before.

        Raises:
            ConfigError: no weights, or a session on another model.
        """
        rater = self._rater()
        if session.routed.model is not self.model:
            raise ConfigError("this rater belongs to another draft than the session's; bind or load it on that model")
        assert session.mask is not None and session.next_position is not None
        B = len(session.rows)
        mask = torch.cat([session.mask, session.mask.new_ones(B, 1)], 1)
        positions = session.next_position[:, None]
        if session.axes == 3:
            positions = positions.expand(3, -1, -1)
        kind = torch.zeros(B, 1, dtype=torch.long, device=mask.device)  # text
        probs = rater(self.model, session.cache, mask, positions, modality=kind, route=False).exp()
        session.cache.crop(-1)
        session.cache.trace.calls.pop()
        lengths = session.mask.sum(1).tolist()
        return self.ratings(probs, int(sum(lengths) / len(lengths)))

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
        rater, shape = self._rater(), backbones.of(self.model).shape(self.model)
        table = probs.cpu().numpy()
        return Ratings(
            score=score_of(self.config.score, each[0], target, cost_weight=self.config.cost_weight, cost_gap=1.0),
            draft=each[0],
            target=target,
            draft_probs=table[:, 0],
            target_probs=table[:, 1] if target is not None else None,
            overhead=Cost(calls=1, tokens_in=1, tokens_cached=context, tokens_out=1, flops=rater.flops(shape, context)),
        )

    def start(self, budget: float) -> float | None:
        """The threshold of a share on the calibration split, for a policy's first decisions; None without one."""
        quantiles = self.facts.get("quantiles")
        return None if not quantiles else float(np.interp(1 - budget, np.linspace(0, 1, len(quantiles)), quantiles))

    def _rater(self) -> Rater:
        if self.rater is None:
            raise ConfigError("this gate has no weights; train it with `mmroute train prp`, or load a trained folder")
        return self.rater

    def calibrate(self, raw: Sequence[np.ndarray], success: Sequence[np.ndarray]) -> None:
        """Fits one map per rating, on a split of its own."""
        self.calibrators = [calibration(self.config.calibration, r, y) for r, y in zip(raw, success, strict=True)]

    # ------------------------------------------------------------------ files

    def save(self, folder: Path) -> str:
        """Writes `rater.safetensors` and `rater.json`; returns the artifact's id.

        Raises:
            MmrouteError: the folder cannot be written.
        """
        weights = tensor_bytes({k: v.detach().cpu().contiguous() for k, v in self._rater().state_dict().items()})
        manifest = {
            "format": FORMAT,
            "config": resolved(self.config),
            "base": fingerprint(self.model),
            "weights": hashlib.sha256(weights).hexdigest(),
            "calibrators": [c.to_dict() for c in self.calibrators],
            **self.facts,
        }
        text = json.dumps(manifest, indent=1) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in (("rater.safetensors", weights), ("rater.json", text.encode())):
                beside = folder / f".{name}.part"
                beside.write_bytes(data)
                beside.replace(folder / name)
        except OSError as error:
            raise MmrouteError(
                f"could not write {folder}: {error.strerror or error}; free space or choose another"
            ) from error
        return hashlib.sha256(weights + text.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, folder: Path, model: Any) -> "Prp":
        """A trained rater on its draft.

        Raises:
            CheckpointMismatch: files are missing or broken, or the draft is not the one it was trained on.
        """
        try:
            text = (folder / "rater.json").read_bytes()
            manifest = json.loads(text)
            weights = (folder / "rater.safetensors").read_bytes()
            state = load_file(folder / "rater.safetensors")
        except (OSError, json.JSONDecodeError, SafetensorError) as error:
            raise CheckpointMismatch(f"{folder}: not a rater ({error}); `mmroute train prp` writes one") from None
        if manifest.get("format") != FORMAT:
            raise CheckpointMismatch(f"{folder}: format {manifest.get('format')!r}, this version reads {FORMAT!r}")
        if hashlib.sha256(weights).hexdigest() != manifest["weights"]:
            raise CheckpointMismatch(f"{folder}: rater.safetensors is not the file that rater.json was written with")
        if fingerprint(model) != manifest["base"]:
            raise CheckpointMismatch(
                f"{folder}: trained on the draft with weights {manifest['base'][:12]}, this model's are "
                f"{fingerprint(model)[:12]}; load the draft it belongs to, or train a rater for this one"
            )
        made = cls(**manifest["config"]).bind(model)
        made._rater().load_state_dict(state)
        made.calibrators = [Calibration.from_dict(each) for each in manifest["calibrators"]]
        known = {"format", "config", "base", "weights", "calibrators"}
        made.facts = {key: value for key, value in manifest.items() if key not in known}
        made.facts["artifact"] = hashlib.sha256(weights + text).hexdigest()[:16]
        return made

    def one(self, ratings: Ratings, index: int) -> Rating:
        """One query's rating with the expected costs of both models, as policies take it."""
        draft, target = self.facts.get("costs", (0.0, 1.0))
        return ratings.one(index, draft, target)


def fingerprint(model: Any) -> str:
    """SHA-256 of the text model's weights: what a draft must be for a rater to fit it."""
    return delta.fingerprint(backbones.of(model).text_model(model).state_dict())
