"""Answers by likelihood: the option whose words the model finds most likely behind the question, on the mean of a word.

A prompt enters once, routed as the recipe says; its cache is then one row per option, and the words of all options
enter in one call. They stand for what the model would write: all run, and none is ranked.

Legend: B batch, R rows: one per option of every item, N words of the longest option, V vocabulary.

Source: the protocol that VoCoT (arXiv 2405.16919) uses for V*, EmbSpatial, MMBench, SEED-Bench, CLEVR and Winoground.
Deviates: its prompts are not taken over: the question stands alone, and an option is its text, or its label where it
    has none; the word that ends an answer does not count. KV bytes are those of one row. The head is counted once per
    option, not once per word.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmroute.bench import items
from mmroute.engine.attach import Routed
from mmroute.errors import ConfigError, InputError
from mmroute.reason import Answer
from mmroute.segment import place_relevance
from mmroute.session import Session
from mmroute.tasks.base import Sample, Score
from mmroute.think.base import LatentThinker, LookingThinker, Thinker

__all__ = ["choose", "option_likelihoods"]


@torch.no_grad()
def choose(routed: Routed, think: Thinker, asked: items.Asked) -> tuple[list[Answer], list[Score]]:
    """The most likely option of every item of one batch, and whether it is right.

    Options that the vocabulary cannot tell apart are no answer: where the best is one of them, nothing is parsed.

    Args:
        routed: an attached model that has a processor.
        think: of the recipe; nothing is written, so it says nothing, but one that takes latent steps or brings its own
            images is refused.
        asked: prompts that end where the option begins.

    Raises:
        ConfigError: such a way to think.
        InputError: an item has no two options, or an option has no words.
    """
    if think.draws or think.num_latents or isinstance(think, LatentThinker | LookingThinker):
        raise ConfigError(
            "options are compared behind the bare question; use --set think.name=direct, or --set "
            "task.protocol=generate to let the model think"
        )
    options = [_options(routed, sample) for sample in asked.samples]
    found, session = option_likelihoods(routed, asked, options)
    answers, scores = [], []
    for row, (sample, ids, values) in enumerate(zip(asked.samples, options, found, strict=True)):
        best = max(range(len(ids)), key=values.__getitem__)
        chosen, told = sample.choices[best], ids.count(ids[best]) == 1
        right = float(told and chosen.label == sample.answer) if sample.answer else None
        scores.append(Score(right, chosen.label if told else None, told, "likelihood"))
        text = chosen.text or chosen.label
        answers.append(
            Answer(
                text=text,
                hops=[text],
                trace=session.trace_of(row),
                ar_steps=1,
                prompt_tokens=int(asked.batch["attention_mask"][row].sum()),
                finished=True,
                ids=ids[best],
            )
        )
    return answers, scores


def _options(routed: Routed, sample: Sample) -> list[list[int]]:
    """[option]: its ids."""
    if len(sample.choices) < 2:
        raise InputError(
            f"{sample.id} has {len(sample.choices)} options, likelihoods compare two or more; ask with "
            "--set task.protocol=generate"
        )
    tokenizer: Any = routed.processor.tokenizer
    out = [tokenizer(c.text or c.label, add_special_tokens=False)["input_ids"] for c in sample.choices]
    if not all(out):
        raise InputError(f"{sample.id}: the option {sample.choices[out.index([])].label} has no words")
    return out


def option_likelihoods(
    routed: Routed, asked: items.Asked, options: Sequence[Sequence[list[int]]]
) -> tuple[list[list[float]], Session]:
    """[item][option]: mean log-probability of its words behind the prompt; items may have different numbers of them.

    Args:
        routed: an attached model.
        asked: the prompts.
        options: [item][option]: ids, one or more.

    Returns:
        The means, and the session, whose trace of an item counts all its options.
    """
    batch = asked.batch
    words = [ids for each in options for ids in each]
    width = max(map(len, words))
    session = Session(routed, reserve=width)
    placed = place_relevance(items.relevance(routed, asked.samples, batch), batch, routed)
    first = session.append(batch, placed)
    most = max(map(len, options))
    session.repeat_rows(most)
    session.keep_rows([b * most + k for b, each in enumerate(options) for k in range(len(each))])
    ids = torch.tensor([[0] * (width - len(w)) + w for w in words], device=first.device)
    mask = torch.tensor([[0] * (width - len(w)) + [1] * len(w) for w in words], device=first.device)
    logits = session.write(ids, mask, [1] * len(words))
    session.ledger.last.kind = "decode"  # one sequential step, however many positions it brings
    items_of = [b for b, each in enumerate(options) for _ in each]
    means = [_mean(first[b], logits[r], w) for r, (b, w) in enumerate(zip(items_of, words, strict=True))]
    ends = [0, *accumulate(map(len, options))]
    return [means[a:b] for a, b in pairwise(ends)], session


def _mean(first: Float[Tensor, " V"], behind: Float[Tensor, "N V"], words: list[int]) -> float:
    """Over the words of one option: the first is foretold by the prompt, each other one by the word before it."""
    rows = torch.cat([first[None], behind[len(behind) - len(words) : -1]]).float().log_softmax(-1)
    return float(rows.gather(1, torch.tensor(words, device=rows.device)[:, None]).mean())
