"""One pass over a lesson as inference takes it: prompt, latent steps, then all that is written at once.

Legend: B batch, N positions, M written positions, D hidden, K copies of image tokens.

Source: Vedas (arXiv 2604.10500), sequence and loss of section 3.
Deviates: gradient runs through all latents (`latent_grad: full`), the release cuts it; one number of latents for all
    rows of a step, so that nothing is padded.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mmroute.cache import Chunk, RaggedCache
from mmroute.decoding import stop_id
from mmroute.engine.attach import Routed
from mmroute.errors import ConfigError
from mmroute.rollout import Edit, Rollout, start
from mmroute.think.base import LatentThinker, Thought
from mmroute.tokens import MAX_HOPS
from mmroute.train.coherence import coherence_loss
from mmroute.train.curriculum import TrainConfig
from mmroute.train.examples import IGNORED
from mmroute.train.lessons import Lesson
from mmroute.train.ranks import Ranks
from mmroute.train.readout import MAX_WORDS, Helpers, Inner, Readout

__all__ = ["Passes", "Worked"]


@dataclass
class Worked:
    """What one pass over a lesson gave."""

    answer: Tensor
    """Cross-entropy of what is written."""
    supervised: Tensor
    """Cross-entropy of the states that latents stand for; 0 where none does."""
    readout: Tensor
    """Cross-entropy of the other words of their groups, as readouts read them; 0 without."""
    coherence: Tensor
    right: list[bool]
    """[row]: whether every written word is the most likely one and, where all is replaced and nothing learned, the
    thought would have ended there by itself."""
    states_right: float
    """Share of the supervised latents whose state the head reads off."""


class Passes:
    """Runs lessons through one attached model; holds no state of a run."""

    def __init__(
        self,
        routed: Routed,
        think: LatentThinker,
        config: TrainConfig,
        helpers: Helpers | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            routed: an attached model with its processor.
            think: who takes the latent steps; attached with it.
            config: how gradients run, and the closer look.
            helpers: networks that training alone uses; None is none.
            ranks: processes that share each lesson; None is this one alone.
        """
        self.routed, self.think, self.config = routed, think, config
        self.sr = None if helpers is None else helpers.sr
        self.readout = None if helpers is None else helpers.readout
        self.ranks = ranks or Ranks()
        self.model: Any = routed.model

    def work(self, lesson: Lesson, latents: int | Literal["all"], keep_last: bool = False) -> Worked:
        """One pass over a lesson as inference takes it: prompt, latent steps, then all that is written at once.

        Args:
            lesson: under the latent cue.
            latents: groups that latents replace.
            keep_last: leave every row its last group.

        Raises:
            ConfigError: a row needs more latents than the recipe's `think.num_latents`, or readouts name a layer that
                the model lacks.
        """
        replaced = [min(len(g) - keep_last, len(g) if latents == "all" else latents) for g in lesson.groups]
        counts = self.counts(replaced, latents)
        training = torch.is_grad_enabled()
        short = max(counts) < MAX_HOPS - 2  # one pass tells no more hops apart
        once = training and self.config.latent_grad == "none" and self.sr is None and short and not self._deepstack
        with self._inner() as inner:
            if once and inner is None:
                rollout, H, labels = self._one_pass(lesson, counts, replaced)
            else:
                rollout, H, labels = self.chunks(lesson, counts, replaced, training)
        learned = labels != IGNORED
        logits = self.head(H[learned])
        loss = self._mean(logits, labels[learned])
        right = learned.clone()
        right[learned] = logits.argmax(-1) == labels[learned]
        good = (right | ~learned).all(1)
        if not training and latents == "all" and not keep_last:
            good &= ~self.ends_early(rollout, counts)
        between = None if inner is None else self._behind(inner, lesson, len(rollout.fed))
        supervised, readout, share = self._supervised(rollout, between, lesson, counts, replaced)
        coherence = loss.new_zeros(())
        if self.sr is not None and rollout.thoughts and training:
            c = self.config
            coherence = coherence_loss(
                self.routed, rollout, rollout.shares, self.sr, lesson.images(), lesson.grids,
                c.window_share, c.window_cells, c.recon_relative,
            )  # fmt: skip
        return Worked(loss, supervised, readout, coherence, good.tolist(), share)

    def _inner(self) -> Inner | nullcontext[None]:
        """Watches the layer that readouts read, where it is not the last."""
        layer = self.config.readout_layer
        if self.readout is None or layer is None:
            return nullcontext()
        return Inner(self.routed.family.text_model(self.model).layers, layer)

    def _behind(self, inner: Inner, lesson: Lesson, steps: int) -> list[Float[Tensor, "B D"]]:
        """By step: what the watched layer gave where the state that was fed back was made, under the last norm."""
        last = lesson.mask.sum(1) - 1
        ends = [inner.seen[0][torch.arange(len(last), device=last.device), last]]
        ends += [seen[:, -1] for seen in inner.seen[1:steps]]
        return [self.routed.family.text_model(self.model).norm(end) for end in ends[:steps]]

    @property
    def _deepstack(self) -> bool:
        """Whether images reach inner layers too, which a pass over embeddings alone would leave out."""
        return self.routed.family.name == "qwen3_vl"

    def counts(self, replaced: list[int], latents: int | str) -> list[int]:
        """[row]: latent steps. With a fixed number every row takes as many, whatever it has to say."""
        c, limit = self.config.latents_per_group, self.think.num_latents
        fixed = getattr(self.think.config, "stop", "fixed") == "fixed"
        wanted = [c * n for n in replaced]
        if fixed and c:
            wanted = [limit if latents == "all" else min(limit, c * int(latents))] * len(replaced)
        if max(c * n for n in replaced) > limit:
            raise ConfigError(
                f"an item has {max(replaced)} groups to replace, think.num_latents allows {limit} latents of "
                f"{c} each; raise it to {c * max(replaced)}, or merge the steps with train.groups"
            )
        return wanted

    def ends_early(self, rollout: Rollout, counts: list[int]) -> Bool[Tensor, " B"]:
        """Rows whose own head would have ended the thought before its last step; none where steps are fixed."""
        early = torch.zeros(len(counts), dtype=torch.bool, device=rollout.mind.hidden.device)
        cue = stop_id(self.routed, self.think)
        if cue is None:
            return early
        for t, state in enumerate(rollout.fed[1:], start=1):  # nobody asks before the first step
            going = torch.tensor([count > t for count in counts], device=early.device)
            early |= going & (self.head(state).argmax(-1) == cue)
        return early

    def prompt(self, lesson: Lesson, cache: RaggedCache) -> Rollout:
        """Enters the prompts; the latent steps are still to be taken."""
        valid = lesson.mask.bool()
        given: dict[str, Any] = dict(lesson.inputs)
        if "inputs_embeds" not in given:
            given["input_ids"] = lesson.ids
        cache.next = Chunk(
            modality=lesson.modality,
            valid=valid,
            protected=self.routed.controller.delimiters[lesson.ids],
            watch=self.think.needs_row,
        )
        h = self.routed.controller.base(
            **given, attention_mask=lesson.mask, position_ids=lesson.positions, past_key_values=cache
        ).last_hidden_state
        last = lesson.mask.sum(1) - 1
        mind = start(
            cache,
            self.think,
            hidden=h[torch.arange(len(h), device=h.device), last],
            modality=lesson.modality,
            valid=valid,
            positions=lesson.positions if lesson.positions.ndim == 3 else lesson.positions[None],
            grids=lesson.grids,
            seeds=torch.arange(len(h), device=h.device),
        )
        return Rollout(self.routed, self.think, cache, mind, lesson.mask)

    def chunks(
        self, lesson: Lesson, counts: list[int], replaced: list[int], training: bool
    ) -> tuple[Rollout, Float[Tensor, "B M D"], Tensor]:
        """As inference runs, on a cache that gradients flow through."""
        cache = self.routed.new_cache(differentiable=training)
        rollout = self.prompt(lesson, cache)
        rollout.edit = self._cut(max(counts))
        mind = rollout.run(counts)
        ids, labels = self.rest(lesson, replaced)
        valid = labels != IGNORED
        cache.start_hop(mind.step + 1)
        cache.next = Chunk(modality=torch.zeros_like(ids), valid=valid, generated=valid)
        places = mind.next_position[:, None] + torch.arange(ids.shape[1], device=ids.device)
        h = self.routed.controller.base(
            inputs_embeds=self._words(ids),
            attention_mask=torch.cat([rollout.mask, valid.to(rollout.mask.dtype)], 1),
            position_ids=places.expand_as(ids) if lesson.positions.ndim == 2 else places.expand(3, -1, -1),
            past_key_values=cache,
        ).last_hidden_state
        return rollout, torch.cat([mind.hidden[:, None], h[:, :-1]], 1), labels

    def _cut(self, steps: int) -> Edit | None:
        """How much of the gradient runs back through what is fed back: all, a share, or only through the last n."""
        kind, _, number = self.config.latent_grad.partition(":")
        decay = self.config.latent_decay
        if kind == "full" and decay == 1:
            return None
        first = 0 if kind == "full" else steps - int(number or 0)

        def edit(step: int, thought: Thought) -> Thought:
            share = decay if step >= first else 0.0
            # The closer look goes on learning through the weights of the copies; the answer does not.
            whole = share == 0 and self.sr is None
            return replace(thought, embeds=thought.embeds.detach()) if whole else _latent_cut(thought, share)

        return edit

    def _one_pass(
        self, lesson: Lesson, counts: list[int], replaced: list[int]
    ) -> tuple[Rollout, Float[Tensor, "B M D"], Tensor]:
        """`latent_grad: none`: the steps are taken without gradient, then all is entered at once as given."""
        with torch.no_grad():
            rollout = self.prompt(lesson, self.routed.new_cache())
            mind = rollout.run(counts)
        ids, labels = self.rest(lesson, replaced)
        thoughts = rollout.thoughts
        embeds = lesson.inputs.get("inputs_embeds")
        if embeds is None:
            embeds = self._entered(lesson)
        valid = labels != IGNORED
        axes = lesson.positions if lesson.positions.ndim == 3 else lesson.positions[None]
        tail = (mind.next_position[:, None] + torch.arange(ids.shape[1], device=ids.device)).expand(len(axes), -1, -1)
        places = torch.cat([axes, *(t.places for t in thoughts), tail], 2)
        mask = torch.cat([rollout.mask.bool(), valid], 1)
        hop = [torch.full_like(t.modality, i) for i, t in enumerate(thoughts, 1)]
        nothing = [torch.zeros_like(t.valid) for t in thoughts]
        h = self.routed.controller.base(
            inputs_embeds=torch.cat([embeds, *(t.embeds for t in thoughts), self._words(ids)], 1),
            modality=torch.cat([lesson.modality, *(t.modality for t in thoughts), torch.zeros_like(ids)], 1),
            hop_ids=torch.cat([torch.zeros_like(lesson.ids), *hop, torch.full_like(ids, len(thoughts) + 1)], 1),
            generated=torch.cat([torch.zeros_like(lesson.mask, dtype=torch.bool), *nothing, valid], 1),
            protected=torch.cat([self.routed.controller.delimiters[lesson.ids], *nothing, valid & False], 1),
            attention_mask=mask.long(),
            position_ids=places if lesson.positions.ndim == 3 else places[0],
            use_cache=False,
        ).last_hidden_state
        before = mask.shape[1] - ids.shape[1]
        column = torch.arange(before, device=ids.device)
        row = torch.arange(len(h), device=ids.device)
        last = torch.where(mask[:, :before], column, -1).amax(1)
        # What was fed back, with gradient: supervision reads the states that this pass computes.
        ends = [lesson.mask.sum(1) - 1]
        start_of = lesson.ids.shape[1]
        for thought in thoughts:
            start_of += thought.valid.shape[1]
            ends.append(torch.where(thought.valid[:, -1], start_of - 1, ends[-1]))
        rollout.fed = [h[row, end] for end in ends[:-1]]
        return rollout, torch.cat([h[row, last][:, None], h[:, before:-1]], 1), labels

    def _entered(self, lesson: Lesson) -> Tensor:
        """Embeddings of the prompts with their images in place."""
        features = torch.cat(self.routed.family.image_features(self.model, lesson.inputs))
        words = self._words(lesson.ids)
        at = self.routed.controller.table[lesson.ids] == 1
        return words.masked_scatter(at[..., None].expand_as(words), features.to(words.dtype))

    def written(self, lesson: Lesson) -> Tensor:
        """Cross-entropy of whole written chains, in one pass."""
        with torch.enable_grad():
            _, H, labels = self.chunks(lesson, [0] * len(lesson.ids), [0] * len(lesson.ids), training=True)
        learned = labels != IGNORED
        return self._mean(self.head(H[learned]), labels[learned])

    def rest(self, lesson: Lesson, replaced: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(B, M) ids of what latents do not replace, and the same with `IGNORED` behind each row's end."""
        rows = [
            [*(i for group in groups[n:] for i in group), *answer]
            for groups, n, answer in zip(lesson.groups, replaced, lesson.answers, strict=True)
        ]
        labels = torch.full((len(rows), max(map(len, rows))), IGNORED)
        for b, row in enumerate(rows):
            labels[b, : len(row)] = torch.tensor(row)
        labels = labels.to(lesson.device)
        return labels.clamp(min=0), labels

    def _supervised(
        self,
        rollout: Rollout,
        between: list[Float[Tensor, "B D"]] | None,
        lesson: Lesson,
        counts: list[int],
        replaced: list[int],
    ) -> tuple[Tensor, Tensor, float]:
        """Each latent against one word of the group it ends, and readouts against the others, of the states `between`
        if given; steps behind the last group repeat its words."""
        none = torch.zeros((), device=lesson.device)
        if not rollout.fed:
            return self._mean(*self._nothing(lesson)), none, 0.0
        c = self.config.latents_per_group
        want = torch.full((len(counts), len(rollout.fed), 1 + MAX_WORDS), IGNORED)
        for b, (count, groups, n) in enumerate(zip(counts, lesson.groups, replaced, strict=True)):
            for t in range(c - 1, count, c):
                if n:
                    words = self._told(groups[min(t // c, n - 1)])[: 1 + MAX_WORDS]
                    want[b, t, : len(words)] = torch.tensor(words)
        want = want.to(lesson.device)
        learned = want[..., 0] != IGNORED
        if not bool(learned.any()):
            return self._mean(*self._nothing(lesson)), none, 0.0
        want = want[learned]
        logits = self.head(torch.stack(rollout.fed, 1)[learned])
        right = (logits.argmax(-1) == want[:, 0]).float().mean()
        read = none
        if self.readout is not None:
            states = torch.stack(rollout.fed if between is None else between, 1)[learned]
            read = self._read(self.readout, states, want[:, 1:])
        return self._mean(logits, want[:, 0]), read, float(right)

    def _told(self, group: list[int]) -> list[int]:
        """A group's words, what the head reads first and then what readouts do, from the last one back."""
        return group[::-1] if self.config.head_reads == "last" else [group[0], *group[:0:-1]]

    def _read(self, readout: Readout, states: Float[Tensor, "n D"], want: Tensor) -> Tensor:
        """Cross-entropy of words (n, MAX_WORDS), those at the group's end first."""
        real = want != IGNORED
        words = int(real.any(0).sum())
        made = readout(states, words).to(states.dtype)
        return self._mean(self.head(made[real[:, :words]]), want[real])

    def _nothing(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """No words, as logits and labels."""
        return torch.zeros(0, 1, device=lesson.device), torch.zeros(0, dtype=torch.long, device=lesson.device)

    def _mean(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy a word; in training over the words of all processes."""
        each = F.cross_entropy(logits, labels, reduction="none")
        return self.ranks.mean(each) if torch.is_grad_enabled() else Ranks().mean(each)

    def head(self, h: Float[Tensor, "n D"]) -> Tensor:
        return self.routed.family.head(self.model, h).float()

    def _words(self, ids: Tensor) -> Tensor:
        return self.routed.family.text_model(self.model).embed_tokens(ids)


def _latent_cut(thought: Thought, share: float) -> Thought:
    """The same latent with a share of its gradient; its copies keep theirs."""
    latent = thought.embeds[:, -1:]
    held = latent.detach()
    return replace(thought, embeds=torch.cat([thought.embeds[:, :-1], held + share * (latent - held)], 1))
