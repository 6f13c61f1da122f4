"""How the next word is chosen, and which words end something.

Legend: B batch, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from mmroute.engine.attach import Routed
from mmroute.errors import ConfigError
from mmroute.think.base import Thinker

__all__ = ["end_ids", "processor_of", "sample", "stop_id"]


def processor_of(routed: Routed) -> Any:
    """The processor that came with the model.

    Raises:
        ConfigError: there is none.
    """
    if routed.processor is None:
        raise ConfigError(
            "answering needs a processor; use mmroute.load(...), or attach(model, processor) with AutoProcessor's"
        )
    return routed.processor


def stop_id(routed: Routed, think: Thinker) -> int | None:
    """The word at which latent steps end by themselves."""
    if getattr(think.config, "stop", "fixed") == "fixed":
        return None
    tokenizer = processor_of(routed).tokenizer
    ids = tokenizer(think.config.answer_cue, add_special_tokens=False)["input_ids"]
    if not ids or ids[0] == tokenizer.unk_token_id:
        raise ConfigError(
            f"think.answer_cue {think.config.answer_cue!r} is no word of this vocabulary, so no thought would end; "
            "give the first word of this model's answers, or set think.stop=fixed"
        )
    return ids[0]


def end_ids(routed: Routed) -> set[int]:
    """The words that end an answer."""
    ends = routed.model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def sample(logits: Tensor, temperature: float, top_p: float, draw: list[torch.Generator]) -> Tensor:
    """(B,) next words: the most likely ones at temperature 0, else drawn, each row by its own generator.

    Args:
        logits: (B, V).
        temperature: 0 or above.
        top_p: share of the probability that the words to draw from hold, the likeliest first.
        draw: [row].
    """
    if temperature == 0:
        return logits.argmax(-1)
    share = (logits.float() / temperature).softmax(-1)
    ranked, order = share.sort(dim=-1, descending=True)
    ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)  # the first one always stays
    picks = [torch.multinomial(row.cpu(), 1, generator=g) for row, g in zip(ranked, draw, strict=True)]
    return order.gather(1, torch.stack(picks).to(order.device)).squeeze(1)
