"""The form `tokens`: the draft writes its ratings itself, `<digit><digit>` and a newline, behind the prefix `<rate>`.

Any server that speaks the chat API can serve such a draft: its chat template has a switch, off unless asked for, that
ends the prompt in the prefix. In this process the same words are put behind a prompt's cache, read, and forgotten.

Source: PRP (arXiv 2606.30217), one or two rating tokens before any reasoning.
Deviates: ten levels, their form and how they are asked for are ours.

Legend: B rows, N columns, R ratings (draft, target), K levels, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmroute import backbones
from mmroute.cost import pairs, position_macs
from mmroute.errors import UnsupportedBackbone
from mmroute.gate._behind import behind
from mmroute.gate._words import LEVELS, PREFIX, SWITCH

__all__ = ["Digits"]

_NEWLINES = ("\n", "Ċ", "<0x0A>")
"""By what name vocabularies know the newline: as it is, in bytes that can be printed, as a byte."""
_LEAST_MASS = 0.5
"""Of the digits together; below it the draft wrote no rating."""


@dataclass(frozen=True)
class Digits:
    """The tokens of a rating in one vocabulary, and the template that asks for it."""

    template: str
    """The processor's chat template, with the switch."""
    prefix: tuple[int, ...]
    levels: tuple[int, ...]
    """The ids of 0 to 9."""
    newline: int
    ratings: int = 2
    """R: digits that are written."""

    @classmethod
    def of(cls, processor: Any, ratings: int = 2) -> "Digits":
        """Finds them; nothing is added to the vocabulary.

        Raises:
            UnsupportedBackbone: a digit or the newline is no token of its own, or the prefix cannot be written.
        """
        tokenizer = processor.tokenizer
        known = [_single(tokenizer, [str(k)], str(k)) for k in range(LEVELS)]
        newline = _single(tokenizer, _NEWLINES, "\n")
        missing = [
            repr(name) for name, i in zip([*map(str, range(LEVELS)), "\n"], [*known, newline], strict=True) if i is None
        ]
        if missing or len(set(known)) < LEVELS:
            raise UnsupportedBackbone(
                f"ratings are written in the tokens 0 to 9 and a newline; this vocabulary has none for "
                f"{', '.join(missing) or 'some of them'}; train the form suffix, which needs no words"
            )
        template, prefix = _switched(processor)
        return cls(template, prefix, tuple(i for i in known if i is not None), int(newline or 0), ratings)

    # ------------------------------------------------------------------ in this process

    @property
    def columns(self) -> int:
        """That a rating leaves behind in the cache: the prefix, and every digit but the last one."""
        return len(self.prefix) + self.ratings - 1

    @property
    def steps(self) -> int:
        """Calls of the model, one after the other."""
        return self.ratings

    def __call__(
        self,
        model: Any,
        cache: Any,
        mask: Int[Tensor, "B N"],
        after: Int[Tensor, " B"],
        axes: int = 1,
        *,
        is_routed: bool = False,
    ) -> Float[Tensor, "B R K"]:
        """Log-probabilities of the levels, each digit read behind the likeliest one before it; see `_behind`.

        A rating whose digits hold less than half of the mass is no number: the draft would write something else.
        """
        B, said = len(mask), []
        ids = torch.tensor(self.prefix, device=mask.device).expand(B, -1)
        for _ in range(self.ratings):
            state = behind(model, cache, mask, after, axes, ids=ids, is_routed=is_routed)
            mask = torch.cat([mask, mask.new_ones(ids.shape)], 1)
            after = after + ids.shape[1]
            logp, mass = self.read(backbones.of(model).head(model, state[:, -1]))
            said.append(logp.masked_fill(mass[:, None] < _LEAST_MASS, torch.nan))
            ids = torch.tensor(self.levels, device=mask.device)[logp.argmax(-1)][:, None]
        return torch.stack(said, 1)

    def read(self, logits: Float[Tensor, "*n V"]) -> tuple[Float[Tensor, "*n K"], Float[Tensor, "*n"]]:
        """Log-probabilities of the levels among themselves, and the share of the whole vocabulary that they hold."""
        logp = logits.float().log_softmax(-1)[..., list(self.levels)]
        mass = logp.logsumexp(-1)
        return logp - mass[..., None], mass.exp()

    def behind_rating(self, ids: list[int]) -> list[int]:
        """What was written, without the rating it begins with; all of it where it begins with none."""
        R = self.ratings
        rated = len(ids) > R and ids[R] == self.newline and all(i in self.levels for i in ids[:R])
        return ids[R + 1 :] if rated else ids

    def flops(self, shape: Any, context: int) -> float:
        """What one rating costs on a prompt of this many positions."""
        attention = 2 * shape.layers * shape.heads * shape.head_dim * pairs(self.columns, context)
        head = self.ratings * shape.hidden * shape.vocab
        return 2.0 * (self.columns * shape.layers * position_macs(shape) + attention + head)


def _single(tokenizer: Any, names: Sequence[str], text: str) -> int | None:
    """The token that writes a text, by the name under which the vocabulary knows it."""
    for name in names:
        found = tokenizer.convert_tokens_to_ids(name)
        if found is not None and found != tokenizer.unk_token_id and tokenizer.decode([found]).strip(" ") == text:
            return found
    return None


def _switched(processor: Any) -> tuple[str, tuple[int, ...]]:
    """A chat template with the switch, and the tokens that it adds to a prompt."""
    template = processor.chat_template
    if not isinstance(template, str):
        raise UnsupportedBackbone(
            f"the processor has {'several' if template else 'no'} chat templates; a rating needs one"
        )
    leads = [None] if SWITCH in template else ["", " "]  # words of some vocabularies end at blanks only
    for lead in leads:
        made = (
            template
            if lead is None
            else f"{template}{{% if {SWITCH} is defined and {SWITCH} %}}{lead}{PREFIX}{{% endif %}}"
        )
        plain, asking = (_ids(processor, made, on) for on in (False, True))
        added = asking[len(plain) :]
        if added and asking[: len(plain)] == plain and processor.tokenizer.unk_token_id not in added:
            return made, tuple(added)
    raise UnsupportedBackbone(
        f"this vocabulary cannot write {PREFIX} behind a prompt without changing the prompt's own tokens; "
        "train the form suffix, which needs no words"
    )


def _ids(processor: Any, template: str, on: bool) -> list[int]:
    """A prompt as the processor itself makes it: some put a token of their own behind the template's text."""
    # A word, not a mark: in a vocabulary of words what touches a word is part of it.
    chat = [{"role": "user", "content": [{"type": "text", "text": "how"}]}]
    given = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, SWITCH: on}
    ids = processor.apply_chat_template(chat, chat_template=template, **given)["input_ids"]
    return list(ids[0] if isinstance(ids[0], list) else ids)
