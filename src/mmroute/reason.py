"""The hop loop: messages and images in, answers with their traces out.

    routed = mmroute.attach(mmroute.load("tiny"), prune=...)
    answer = routed.answer("task: maze <image> actions: s1 right s2 down", images=["maze.png"])
    print(answer.text, answer.trace.calls[0].layers[3].ran)

Rows of a batch that have finished leave it: their cache is dropped and they cost nothing more.

Legend: B batch, N positions, V vocabulary.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmroute import hub
from mmroute.backbones.images import check_prompt, open_images, prepare
from mmroute.beams import search
from mmroute.decoding import end_ids, processor_of, sample
from mmroute.engine.attach import Routed, fit
from mmroute.errors import ConfigError, InputError
from mmroute.interleave import interleaver
from mmroute.rollout import Edit
from mmroute.segment import place_relevance
from mmroute.session import Session
from mmroute.think.base import Box, LatentThinker, LookingThinker, Thinker
from mmroute.trace import Trace

__all__ = ["Answer", "answer", "answer_many", "converse"]

log = logging.getLogger(__name__)

IMAGE_MARK = "<image>"


@dataclass
class Answer:
    """What one conversation led to."""

    text: str
    """The completion, special tokens left out."""
    hops: list[str]
    """Its text hop by hop, as `think` cut it."""
    trace: Trace
    """What ran, layer by layer; one row."""
    ar_steps: int
    """Sequential steps after the prefill: every latent and every generated token, the closing one included."""
    prompt_tokens: int
    finished: bool
    """False where `max_new_tokens` ended it."""
    ids: list[int] = field(repr=False, default_factory=list)
    """Generated ids."""
    latents: int = 0
    """Latent steps among `ar_steps`."""
    pictures: list[list[int]] = field(repr=False, default_factory=list)
    """Pictures that it drew as thoughts: token ids of their codes, row by row."""
    boxes: list[Box] = field(default_factory=list)
    """Boxes that it wrote and whose image features entered."""


def answer(routed: Routed, question: str, images: Any = (), **options: Any) -> Answer:
    """One answer about images.

    Args:
        routed: an attached model that has a processor.
        question: free text; `<image>` marks where an image goes, otherwise all go first.
        images: paths or Pillow images, one for each mark.
        options: as in `answer_many`.

    Raises:
        InputError: an empty question, an image that cannot be used, or another number of images than marks.
    """
    options["think"] = options.get("think") or routed.think or hub.load("think", "text")
    return answer_many(routed, [converse(routed, question, images, options["think"])], **options)[0]


def converse(routed: Routed, question: str, images: Any, think: Thinker) -> list[dict[str, Any]]:
    """The conversation that `answer` answers: one user message, its images in place, with the thinker's cue."""
    given = [images] if isinstance(images, str | Path | bytes | Image.Image) else list(images)
    check_prompt(question.replace(IMAGE_MARK, " "), given, processor_of(routed))
    pictures = open_images(given)
    text = _cued(routed, question, think)
    marks = text.count(IMAGE_MARK)
    if marks and marks != len(pictures):
        raise InputError(
            f"{len(pictures)} images given, the question marks {marks} places ({IMAGE_MARK}); give one image for each "
            "mark, or write none and all go first"
        )
    blocks: list[dict[str, Any]] = [] if marks else [{"type": "image", "image": p} for p in pictures]
    for i, piece in enumerate(text.split(IMAGE_MARK)):
        if i:
            blocks.append({"type": "image", "image": pictures[i - 1]})
        if piece.strip():
            blocks.append({"type": "text", "text": piece.strip()})
    return [{"role": "user", "content": blocks}]


def _cued(routed: Routed, question: str, think: Thinker) -> str:
    """The question with the first cue that the model's vocabulary can write."""
    tokenizer = processor_of(routed).tokenizer
    unknown = tokenizer.unk_token_id

    def writes(text: str) -> bool:
        return unknown is None or unknown not in tokenizer(text, add_special_tokens=False)["input_ids"]

    words = question.replace(IMAGE_MARK, " ")
    if not writes(words):
        bad = [w for w in words.split() if not writes(w)]
        log.warning(
            "this model has a closed vocabulary and does not know: %s. It answers questions such as "
            "'task: maze <image> actions: s1 right s2 down'; `mmroute demo` shows more",
            ", ".join(dict.fromkeys(bad)),
        )
    for cue in think.cues:
        if writes(cue):
            return question if question.rstrip().endswith(cue) else f"{question} {cue}"
    return question


@torch.no_grad()
def answer_many(
    routed: Routed,
    conversations: Sequence[list[dict[str, Any]]],
    *,
    think: Thinker | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int | Sequence[int] = 0,
    relevance: Sequence[Sequence[float]] | None = None,
    observations: Sequence[Sequence[Any]] | None = None,
    prepared: dict[str, Tensor] | None = None,
    edit: Edit | None = None,
) -> list[Answer]:
    """Several conversations in one batch; each gets the answer it would get alone.

    Args:
        routed: an attached model that has a processor.
        conversations: chat messages whose content is a list of image and text blocks.
        think: what a hop is; default what the model was attached with, else written text.
        max_new_tokens: longest completion; default the thinker's.
        temperature: 0 is greedy.
        top_p: with a temperature, the share of probability that is sampled from.
        num_beams: above 1, the best of a beam search, as stock `generate` finds it; without a temperature.
        seed: one for each conversation, or a number: conversation i then has seed + i. Each draws from its own
            stream, so a sample depends on its seed and not on the batch.
        relevance: for pruners that ask for ground truth: one number per vision position of each prompt; a picture
            that enters later has the same.
        observations: pictures of each conversation that enter behind its finished steps, in order: the first one when
            the first step that `think` recognises is over. What comes next is then written anew, with the picture in
            view; all pictures stay in the context.
        prepared: what `images.prepare` made of these conversations, where several runs share it.
        edit: changes what each latent step enters, to find out what it is for; called with its number from 0.

    Raises:
        ConfigError: no processor, or a setting out of range.
        InputError: an image cannot be used, or as many seeds, relevances or observations are needed as there are
            conversations.
    """
    think = think or routed.think or hub.load("think", "text")
    limit = max_new_tokens if max_new_tokens is not None else think.max_new_tokens
    if limit < 1 or not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise ConfigError(
            f"max_new_tokens >= 1, temperature >= 0 and top_p in (0, 1] are needed, given {limit}, {temperature}, "
            f"{top_p}"
        )
    pruner = routed.controller.pruner
    if (think.draws or isinstance(think, LookingThinker)) and (num_beams > 1 or observations is not None):
        raise ConfigError(
            "thoughts that hold pictures or boxes are written one at a time and bring their own images; leave "
            "num_beams and observations out"
        )
    if num_beams < 1 or (num_beams > 1 and (temperature or (pruner is not None and pruner.closes))):
        raise ConfigError(
            f"num_beams >= 1 is needed, and above 1 no temperature and no pruner that closes hops, given {num_beams} "
            f"with temperature {temperature}"
        )
    if not conversations:
        return []
    seeds = [seed + i for i in range(len(conversations))] if isinstance(seed, int) else list(seed)
    for name, given in (("seed", seeds), ("relevance", relevance), ("observations", observations)):
        if given is not None and len(given) != len(conversations):
            raise InputError(f"{name} has {len(given)} entries for {len(conversations)} conversations; give one each")
    tokenizer = processor_of(routed).tokenizer
    batch = prepared if prepared is not None else prepare(routed.model, processor_of(routed), conversations)
    session = Session(routed, reserve=limit + think.columns)
    session.draws = think.draws
    placed = place_relevance(relevance, batch, routed)
    if isinstance(think, LatentThinker) and think.num_latents:
        if think.learned is None:
            fit(think, routed.family, routed.model)
        session.append(batch, placed, think=think)
        logits = session.think(think, seeds, edit)
    else:
        logits = session.append(batch, placed)
    company = interleaver(session, think, processor_of(routed), batch, relevance)
    draw = [torch.Generator().manual_seed(each) for each in seeds]
    ends = end_ids(routed)
    written: list[list[int]] = [[] for _ in conversations]
    cuts: list[list[int]] = [[0] for _ in conversations]
    hop = [1 + max(session.latents.values(), default=0)] * len(conversations)
    pieces: dict[int, bool] = {}
    in_step = [False] * len(conversations)  # whether the present hop began where `think` names a step
    waiting = [list(pictures) for pictures in observations or [[]] * len(conversations)]

    def begins(value: int) -> bool:
        if value not in pieces:
            pieces[value] = think.starts_hop(tokenizer.decode([value]))
        return pieces[value]

    if num_beams > 1:
        written = search(session, logits, num_beams, limit, ends, hop[0])
    for _ in range(limit if num_beams == 1 else 0):
        if company is not None:
            logits = company.limit(logits)
        ids = sample(logits, temperature, top_p, [draw[r] for r in session.rows])
        values = ids.tolist()
        through = company.over if company is not None else set()
        over = [(begins(v) or r in through) and bool(written[r]) for r, v in zip(session.rows, values, strict=True)]
        due = [i for i, (o, r) in enumerate(zip(over, session.rows, strict=True)) if o and in_step[r] and waiting[r]]
        if due:
            shown = {i: waiting[session.rows[i]].pop(0) for i in due}
            logits = session.observe(
                [shown.get(i) for i in range(len(ids))],
                [hop[r] for r in session.rows],
                None if relevance is None else [relevance[r] if i in shown else [] for i, r in enumerate(session.rows)],
            )
            ids[due] = sample(logits[due], temperature, top_p, [draw[session.rows[i]] for i in due])
            values = ids.tolist()
        for row, value, ended in zip(session.rows, values, over, strict=True):
            if ended or not written[row]:
                in_step[row] = begins(value)
        for row, value in zip(session.rows, values, strict=True):
            written[row].append(value)
        stays = [i for i, value in enumerate(values) if value not in ends]
        if not stays or len(written[session.rows[stays[0]]]) == limit:
            break
        if len(stays) < len(values):
            session.keep_rows(stays)
            ids = ids[torch.tensor(stays, device=ids.device)]
            over = [over[i] for i in stays]
        if any(over):
            session.close_hop([hop[r] if s else -1 for r, s in zip(session.rows, over, strict=True)])
            for row, starts in zip(session.rows, over, strict=True):
                if starts:
                    hop[row] += 1
                    cuts[row].append(len(written[row]) - 1)
        logits = session.step(ids, [hop[r] for r in session.rows])
        if company is not None:
            logits = company.follow(written, [hop[r] for r in session.rows], logits)

    def said(ids: list[int]) -> str:
        return tokenizer.decode(ids if company is None else company.words(ids), skip_special_tokens=True)

    return [
        Answer(
            text=said(ids),
            hops=[said(ids[a:b]) for a, b in zip(cuts[row], [*cuts[row][1:], len(ids)], strict=True)],
            trace=session.trace_of(row),
            ar_steps=len(ids) + session.latents.get(row, 0),
            prompt_tokens=int(batch["attention_mask"][row].sum()),
            finished=ids[-1] in ends,
            ids=ids,
            latents=session.latents.get(row, 0),
            pictures=company.pictures(ids) if company is not None else [],
            boxes=company.boxes.get(row, []) if company is not None else [],
        )
        for row, ids in enumerate(written)
    ]
