"""The contract of a task: samples in, chat messages and scores out; generated worlds add an exact simulator.

A public benchmark subclasses `Task`; a world we generate subclasses `Generated` and fills the abstract methods at its
end. Nothing is ever read back from pixels to make a label: spec -> trace -> tiles -> pixels, and spec -> words.

Legend: C tiles of one side of the canvas, n cells of one side of the board (n <= C).
A cell is (row, column) on the board; a tile id is row * C + column on the canvas.
"""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Int
from PIL import Image
from pydantic import Field

from mmroute.config import options, parse
from mmroute.errors import ConfigError, InputError
from mmroute.tasks import _mvot_skin, _skins
from mmroute.tasks._grid import SPLITS, Cell, Split
from mmroute.tasks._presets import PRESETS, Preset, level_of, plan
from mmroute.tasks._relevance import Relevance, relevant_tokens
from mmroute.tasks._schema import Card, Choice, Hop, Sample, Score, Spec, State
from mmroute.tasks._texts import BOS, EOS, IMAGE, VISION_END, VISION_START, Words, coordinate

__all__ = [
    "Card",
    "Choice",
    "Generated",
    "Hop",
    "Relevance",
    "Sample",
    "Score",
    "Spec",
    "State",
    "Task",
    "group_accuracy",
    "messages_so_far",
    "relevant_tokens",
]

MAX_PROBE_CELLS = 14
_Style = Literal["cot", "direct", "latent", "probe", "sentence"]


class Task(ABC):
    """A source of samples with its prompt and its scorer."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when a rule, a text or the scorer changes; reported as `maze-v1`."""
    card: ClassVar[Card]

    @abstractmethod
    def samples(self, split: str, n: int | None = None, offset: int = 0) -> Iterator[Sample]:
        """Samples `offset` .. `offset + n - 1` of a split; None is the whole split."""

    @abstractmethod
    def messages(self, sample: Sample, style: str | None = None) -> list[dict[str, Any]]:
        """Chat messages whose content is a list of image and text blocks."""

    @abstractmethod
    def score(self, sample: Sample, completion: str, scorer: str | None = None) -> Score:
        """What the completion is worth; it alone is read, never the prompt."""


class Generated(Task):
    """A world with an exact simulator; see the module docstring."""

    @options
    class Config:
        preset: str = "small"
        variant: Literal["auto", "quad", "stream", "mvot"] = "auto"
        """`auto` is the stream for train and counterbalanced items for val and test."""
        skin: Literal["auto", "tiles", "mvot"] = "auto"
        """`auto` is the preset's own."""
        walls: Literal["tiles", "edges"] = "tiles"
        """Mazes only: a wall is a tile, or a line between two cells."""
        hop_images: Literal["none", "observed"] = "none"
        """`observed` draws the simulator's picture after every hop."""
        hop_text: Literal["cot", "sentence", "action"] = "cot"
        prompt_order: Literal["image_first", "question_first"] = "image_first"
        coords: Literal["auto", "canvas", "board"] = "auto"
        """`auto` counts from the canvas with tiles and from the board with the mvot skin."""
        tile_px: Annotated[int, Field(ge=14, le=64)] = 28
        """Side of one tile in pixels: one vision token of the model after merging."""
        noise: Annotated[float, Field(ge=0, le=0.05)] | None = None
        """Standard deviation in units of full scale; None is the preset's."""
        solvable: Literal["all", "none"] = "all"
        """`none` fogs what decides, in val and test only."""
        seed: Annotated[int, Field(ge=0)] = 0

    task_id: ClassVar[int]
    """Enters every seed; never reused."""
    unit_size: ClassVar[int] = 4
    """Held-out items come in units of this many, made together."""
    variants: ClassVar[tuple[str, ...]] = ("auto", "quad", "stream")
    levels: ClassVar[bool] = True
    """Whether held-out items are drawn by level of difficulty; else by size and length, each uniform."""
    config: Any

    def __init__(self, **given: Any) -> None:
        self.config = parse(self.Config, given, f"tasks.{self.name}")
        if self.config.preset not in PRESETS:
            raise ConfigError(f"tasks.{self.name}.preset: one of {', '.join(PRESETS)} (given {self.config.preset!r})")
        self.preset: Preset = PRESETS[self.config.preset]
        self.variant: str = self.preset.variant if self.config.variant == "auto" else self.config.variant
        if self.variant not in self.variants:
            allowed = ", ".join(self.variants)
            raise ConfigError(
                f"tasks.{self.name}.variant: one of {allowed} (given {self.variant!r} by option or preset); "
                "take another preset or variant"
            )
        self.skin: str = self.preset.skin if self.config.skin == "auto" else self.config.skin
        self.noise: float = self.preset.noise if self.config.noise is None else self.config.noise
        self.coords: str = (
            ("canvas" if self.skin == "tiles" else "board") if self.config.coords == "auto" else (self.config.coords)
        )
        self._last: dict[tuple[str, int], list[Spec]] = {}

    # ------------------------------------------------------------------ items

    @property
    def sizes(self) -> tuple[int, ...]:
        """Board sides of this preset."""
        return tuple(range(self.preset.sizes[0], self.preset.sizes[1] + 1))

    def max_length(self, size: int) -> int:
        """Most listed actions on a board of this side."""
        return min(2 * size, self.preset.hops[1])

    def spec(self, split: Split, index: int) -> Spec:
        """Item `index` of a split: the same bytes alone or in a run, in any process.

        Raises:
            ConfigError: no such split, or a negative index.
        """
        if split not in SPLITS or index < 0:
            raise ConfigError(f"split is one of {', '.join(SPLITS)} and index >= 0, given {split!r}, {index}")
        size = 1 if self._streams(split) else self.unit_size
        key = (split, index // size)
        if key not in self._last:  # the items of a unit are asked for one after the other
            self._last = {key: self._unit(*key)}
        return self._last[key][index % size]

    def _streams(self, split: str) -> bool:
        return self.variant in ("stream", "mvot") or (self.variant == "auto" and split == "train")

    def _unit(self, split: Split, unit: int) -> list[Spec]:
        words = [self.config.seed, self.task_id, self.preset.id, SPLITS.index(split), unit]
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
        preset, fogged = self._mixed(rng, split)
        streams = self._streams(split)
        size, length = plan(rng, preset, self._pairs(preset, streams), self.name, self.levels)
        if streams:
            specs = [self._draw(rng, preset, size, length, split)]
        else:
            specs = self._held_out(rng, preset, size, length, split, unit)
            group = f"{self.name}-{preset.name}-{split}-{unit:06d}" if self.unit_size > 1 else ""
            specs = [dataclasses.replace(s, group=group) for s in specs]
        named = [
            dataclasses.replace(s, preset=self.config.preset, split=split, index=unit * len(specs) + i)
            for i, s in enumerate(specs)
        ]
        return [self._fogged(s) for s in named] if fogged else named

    def _mixed(self, rng: np.random.Generator, split: str) -> tuple[Preset, bool]:
        if not self.preset.mix:
            return self.preset, self.config.solvable == "none" and split != "train"
        names = list(self.preset.mix)
        name = names[int(rng.choice(len(names), p=list(self.preset.mix.values())))]
        if name == "unsolvable":
            return PRESETS["small"], split != "train"
        return PRESETS[name if self._pairs(PRESETS[name], False) else "small"], False

    def _fogged(self, spec: Spec) -> Spec:
        return dataclasses.replace(spec, fog=tuple(sorted(self.tile(spec, cell) for cell in self._decisive(spec))))

    def stream(self, rng: np.random.Generator, size: int, length: int) -> Spec:
        """An endless training item: layouts of the train split only, answers drawn first where they can be.

        Args:
            rng: where all randomness comes from.
            size: side of the board in cells.
            length: number of listed actions, or of arrows to follow.
        """
        return self._draw(rng, self.preset, size, length, "train")

    def _finish(
        self, rng: np.random.Generator, preset: Preset, n: int, world: dict[str, Any], answer: int, key: str
    ) -> Spec:
        """A spec at a random offset, of the training stream until someone renames it."""
        row, col = (int(x) for x in rng.integers(preset.canvas - n + 1, size=2))
        return Spec(
            task=self.name,
            version=self.version,
            preset=preset.name,
            split="train",
            index=-1,
            n=n,
            canvas=preset.canvas,
            offset=(row, col),
            seed=int(rng.integers(2**62)),
            world=world,
            answer=answer,
            layout_hash=key,
        )

    # ------------------------------------------------------------------ pictures

    def tile(self, spec: Spec, cell: Cell) -> int:
        """Canvas tile id of a board cell."""
        return (cell[0] + spec.offset[0]) * spec.canvas + cell[1] + spec.offset[1]

    def board(self, spec: Spec) -> list[int]:
        """All n * n tile ids of the board."""
        return [self.tile(spec, (r, c)) for r in range(spec.n) for c in range(spec.n)]

    def codes(self, spec: Spec, state: int = 0) -> Int[np.ndarray, "C C"]:
        """Atlas codes of every tile of the canvas after `state` hops, as int16."""
        return self._codes(spec, self.trace(spec)[state] if state else None)

    def _codes(self, spec: Spec, state: State | None) -> Int[np.ndarray, "C C"]:
        out = _skins.background(spec.seed, spec.canvas)
        (r, c), n = spec.offset, spec.n
        out[r : r + n, c : c + n] = self._board_codes(spec, state)
        if spec.fog:
            out.reshape(-1)[list(spec.fog)] = _skins.FOG
        return out

    def draw(self, spec: Spec, state: State | None = None, skin: str | None = None) -> Image.Image:
        """The picture of a state; None is the state of the question."""
        if (skin or self.skin) == "mvot":
            return self._mvot(spec, self.trace(spec)[0] if state is None else state)
        step = 0 if state is None else state.step
        noise, look = self.noise, self.preset.look
        return _skins.picture(self._codes(spec, state), spec.seed + step, self.config.tile_px, noise, look)

    def decode(self, image: Image.Image, spec: Spec, skin: str | None = None) -> State:
        """Which state a picture of this item shows; only the picture says where the agent is.

        Raises:
            InputError: no state of this item looks like that.
        """
        if (skin or self.skin) == "mvot":
            return _mvot_skin.nearest(image, self.trace(spec), lambda state: self._mvot(spec, state))
        codes = _skins.read(image, self.config.tile_px, self.preset.look)
        if codes.shape != (spec.canvas, spec.canvas):
            raise InputError(f"the item has {spec.canvas} x {spec.canvas} tiles, the picture {codes.shape}")
        (r, c), n = spec.offset, spec.n
        return self._read(codes[r : r + n, c : c + n], spec)

    def _mvot(self, spec: Spec, state: State) -> Image.Image:
        raise ConfigError(f"{self.name} has no mvot skin; use --set task.skin=tiles")

    # ------------------------------------------------------------------ words

    def relevant(self, spec: Spec, hop: int) -> list[int]:
        """Tile ids that must be seen at a hop: 0 finds the start, 1 .. T are the hops, T + 1 is the answer."""
        return sorted({self.tile(spec, cell) for cell in self._looked_at(spec, hop)})

    def words(self, spec: Spec, mode: Literal["cot", "direct", "latent", "probe"]) -> Words:
        """Prompt and response of the small models, word by word of the closed vocabulary."""
        picture = [VISION_START, *[IMAGE] * (spec.canvas * spec.canvas), VISION_END]
        head, question = [BOS, "task:", self.name], self.question_words(spec)
        ordered = [*head, *picture, *question] if self.config.prompt_order == "image_first" else [
            *head, *question, *picture
        ]  # fmt: skip
        prompt = [*ordered, f"{mode}:"]
        if mode == "probe":
            response, supervised = self._probe(spec)
            return Words(prompt, [*response, EOS], [*supervised, True])
        steps = self.chain(spec) if mode == "cot" else []
        response = [w for step in steps for w in step] + ["answer:", self._answer_word(spec), EOS]
        return Words(prompt, response, [True] * len(response))

    def _probe(self, spec: Spec) -> tuple[list[str], list[bool]]:
        rng = np.random.default_rng([spec.seed, 1])
        cells = [(int(i) // spec.n, int(i) % spec.n) for i in rng.permutation(spec.n**2)[:MAX_PROBE_CELLS]]
        finds = [([(w, False) for w in name], [(self.at(spec, cell), True)]) for name, cell in self._unique(spec)]
        finds = [finds[int(i)] for i in rng.permutation(len(finds))]
        first = [pair for asked, answer in finds for pair in (*asked, *answer, (".", False))]
        second = [
            pair
            for cell in cells
            for pair in ((self.at(spec, cell), False), *((w, True) for w in self._seen(spec, cell)))
        ]
        pairs = [*first, *second] if rng.random() < 0.5 else [*second, (".", False), *first]
        return [w for w, _ in pairs], [s for _, s in pairs]

    def at(self, spec: Spec, cell: Cell) -> str:
        """The coordinate word of a cell."""
        row, col = spec.offset if self.coords == "canvas" else (0, 0)
        return coordinate(cell[0] + row, cell[1] + col)

    def messages(self, sample: Sample, style: str | None = None) -> list[dict[str, Any]]:
        """The question as one chat message; blocks printed in order are the words of `words`.

        Args:
            sample: one of ours.
            style: `cot`, `direct`, `latent` or `probe` (the short words), or `sentence` (plain English).

        Raises:
            ConfigError: no such style.
        """
        style = style or "cot"
        image = {"type": "image", "image": sample.images[sample.prompt_images[0]]}
        if style == "sentence":
            return [{"role": "user", "content": [image, {"type": "text", "text": sample.question}]}]
        if style not in ("cot", "direct", "latent", "probe"):
            raise ConfigError(f"messages has the styles cot, direct, latent, probe and sentence (given {style!r})")
        spec = Spec.from_dict(sample.meta["spec"])
        head, question = f"task: {self.name}", " ".join(self.question_words(spec))
        blocks: list[dict[str, Any]]
        if self.config.prompt_order == "image_first":
            blocks = [{"type": "text", "text": head}, image, {"type": "text", "text": f"{question} {style}:"}]
        else:
            blocks = [{"type": "text", "text": f"{head} {question}"}, image, {"type": "text", "text": f"{style}:"}]
        return [{"role": "user", "content": blocks}]

    # ------------------------------------------------------------------ samples

    def samples(self, split: str, n: int | None = None, offset: int = 0) -> Iterator[Sample]:
        """Samples of a split, made one by one.

        Raises:
            ConfigError: `n` is None and the split is an endless stream, or the preset has no such split.
        """
        if n is None:
            size = self.preset.splits.get(split)
            if size is None:
                known = ", ".join(k for k, v in self.preset.splits.items() if v) or "none"
                raise ConfigError(
                    f"{self.name}:{self.preset.name} {split!r} has no fixed size; give n (sized: {known})"
                )
            n = size - offset
        return (self.sample(self.spec(split, offset + i)) for i in range(n))  # type: ignore[arg-type]

    def sample(self, spec: Spec) -> Sample:
        """The item with its pictures and texts."""
        trace = self.trace(spec)
        observed = self.config.hop_images == "observed"
        images: list[Any] = [self.draw(spec)]
        hops = []
        for i, state in enumerate(trace[1:], start=1):
            if observed:
                images.append(self.draw(spec, state))
            cell = state.cell
            assert cell is not None  # a hop always ends somewhere
            hops.append(
                Hop(
                    text=self._hop_text(spec, i, state),
                    image=i if observed else -1,
                    boxes=[self._box(spec, cell)] if self.boxes else [],
                    box_image=0 if self.boxes else -1,
                    state=self.at(spec, cell),
                    relevant=self.relevant(spec, i),
                )
            )
        choices = self.choices(spec)
        label = choices[spec.answer].label
        side = self.config.tile_px
        meta = {
            "spec": json.loads(spec.to_json()),
            "layout_hash": spec.layout_hash,
            "generator": f"{self.name}/{self.version}",
            "canvas": [spec.canvas, spec.canvas, side] if self.skin == "tiles" else [],
            "board": self.board(spec),
            "relevant": {"start": self.relevant(spec, 0), "answer": self.relevant(spec, len(trace))},
            "skin": self.skin,
            "source": "generated",
            "license": "CC0-1.0",
        }
        return Sample(
            id=f"{self.name}-v{self.version}-{spec.preset}-{spec.split}-{spec.index:06d}",
            task=self.name,
            split=spec.split,
            group=spec.group,
            question=self.question(spec),
            images=images,
            prompt_images=[0],
            hops=hops,
            choices=choices,
            answer=label,
            answer_index=spec.answer,
            answer_text=f"answer: {self._answer_word(spec)}"
            if self.config.hop_text == "cot"
            else (f"The answer is {label}."),
            difficulty=self._difficulty(spec, trace),
            meta=meta,
        )

    boxes: ClassVar[bool] = False
    """Whether a hop is the box of what it looks at."""

    def _box(self, spec: Spec, cell: Cell) -> list[float]:
        row, col = cell[0] + spec.offset[0], cell[1] + spec.offset[1]
        return [col / spec.canvas, row / spec.canvas, (col + 1) / spec.canvas, (row + 1) / spec.canvas]

    def _hop_text(self, spec: Spec, hop: int, state: State) -> str:
        if self.config.hop_text == "cot":
            steps = self.chain(spec)
            head = len(steps) - (len(self.trace(spec)) - 1)  # steps before the first hop, e.g. `start r2c1 .`
            own = steps[head + hop - 1]
            return " ".join([w for step in steps[:head] for w in step] + own if hop == 1 else own)
        return self.describe(spec, hop, state, self.config.hop_text)

    def _difficulty(self, spec: Spec, trace: Sequence[State]) -> dict[str, Any]:
        hops, blocked = len(trace) - 1, sum(s.event == "wall" for s in trace)
        score, level = level_of(hops, spec.n, blocked / max(hops, 1), self.noise)
        return {
            "level": level,
            "score": score,
            "hops": hops,
            "grid": spec.n,
            "distractors": self._distractors(spec),
            "blocked": blocked,
            "noise": self.noise,
            "solvable": not spec.fog,
        }

    def _distractors(self, spec: Spec) -> int:
        return len(self.choices(spec)) - 1

    def score(self, sample: Sample, completion: str, scorer: str | None = None) -> Score:
        """Strict: the last anchored answer phrase of the completion, else a lone label; unparsed is wrong.

        Raises:
            ConfigError: another scorer than `strict`.
        """
        from mmroute.tasks import _parse  # its tables are of no use to whoever only draws pictures

        if scorer not in (None, "strict"):
            raise ConfigError(f"{self.name} has the scorer strict only (given {scorer!r})")
        label = _parse.strict(completion, sample.choices)
        return Score(float(label == sample.answer), label, label is not None, "strict")

    # ------------------------------------------------------------------ what a world fills in

    @abstractmethod
    def _pairs(self, preset: Preset, streams: bool) -> list[tuple[int, int]]:
        """(size, length) pairs that items of the preset may have."""

    @abstractmethod
    def _draw(self, rng: np.random.Generator, preset: Preset, size: int, length: int, split: Split) -> Spec:
        """One item of the stream whose layout lies in `split`."""

    @abstractmethod
    def _held_out(
        self, rng: np.random.Generator, preset: Preset, size: int, length: int, split: Split, unit: int
    ) -> list[Spec]:
        """One counterbalanced unit of `unit_size` items, all layouts in `split`."""

    @abstractmethod
    def trace(self, spec: Spec) -> list[State]:
        """The exact simulator: states 0 .. T."""

    @abstractmethod
    def choices(self, spec: Spec) -> list[Choice]:
        """The possible answers, in the order of `spec.answer`."""

    @abstractmethod
    def chain(self, spec: Spec) -> list[list[str]]:
        """The written chain in steps; the last T of them are the hops."""

    @abstractmethod
    def question(self, spec: Spec) -> str:
        """The question in plain English."""

    @abstractmethod
    def describe(self, spec: Spec, hop: int, state: State, style: str) -> str:
        """One hop in plain English: `sentence`, or the bare `action`."""

    @abstractmethod
    def question_words(self, spec: Spec) -> list[str]:
        """The question in words of the vocabulary, without task and mode."""

    @abstractmethod
    def _board_codes(self, spec: Spec, state: State | None) -> Int[np.ndarray, "n n"]:
        """Atlas codes of the board; None is state 0."""

    @abstractmethod
    def _read(self, codes: Int[np.ndarray, "n n"], spec: Spec) -> State:
        """The state that board codes show."""

    @abstractmethod
    def _looked_at(self, spec: Spec, hop: int) -> Iterable[Cell]:
        """Board cells that must be seen at a hop; see `relevant`."""

    @abstractmethod
    def _unique(self, spec: Spec) -> list[tuple[list[str], Cell]]:
        """Things that stand once on the board, by their words: what reverse look-ups ask."""

    @abstractmethod
    def _seen(self, spec: Spec, cell: Cell) -> list[str]:
        """What a cell holds, in words."""

    @abstractmethod
    def _decisive(self, spec: Spec) -> Iterable[Cell]:
        """Cells whose fog leaves the answer a guess."""

    def _answer_word(self, spec: Spec) -> str:
        return self.choices(spec)[spec.answer].label


def messages_so_far(
    task: Task, sample: Sample, hop: int, context: Literal["accumulate", "markov2"], style: str | None = None
) -> list[dict[str, Any]]:
    """The conversation after `hop` hops: the question, then the thoughts so far in one assistant turn.

    Args:
        task: what the sample came from.
        sample: with hop images or without.
        hop: number of hops that are done; 0 is the bare question.
        context: `accumulate` keeps every thought image; `markov2` the question's and the latest only.
        style: as in `Task.messages`.

    Raises:
        ConfigError: more hops than the sample has.
    """
    if not 0 <= hop <= len(sample.hops):
        raise ConfigError(f"{sample.id} has {len(sample.hops)} hops, given hop={hop}")
    out = task.messages(sample, style)
    blocks: list[dict[str, Any]] = []
    for i, done in enumerate(sample.hops[:hop], start=1):
        blocks.append({"type": "text", "text": done.text})
        if done.image >= 0 and (context == "accumulate" or i == hop):
            blocks.append({"type": "image", "image": sample.images[done.image]})
    return [*out, {"role": "assistant", "content": blocks}] if blocks else out


def group_accuracy(groups: Sequence[str], correct: Sequence[float]) -> float:
    """Share of groups of which every item is right; an item without a group is a group of its own."""
    worst: dict[str, float] = {}
    for i, (group, value) in enumerate(zip(groups, correct, strict=True)):
        key = group or f"#{i}"
        worst[key] = min(worst.get(key, 1.0), value)
    return float(np.mean([v == 1 for v in worst.values()])) if worst else float("nan")
