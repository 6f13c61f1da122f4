"""A generated world: exact simulator, pictures and texts of its items. A world's file fills the methods at the end.

Nothing is ever read back from pixels to make a label: spec -> trace -> tiles -> pixels, and spec -> words.

Legend: C tiles of one side of the canvas, n cells of one side of the board (n * cell_side <= C).
A cell is (row, column) on the board; a tile id is row * C + column on the canvas.
"""

import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Int
from PIL import Image

from mmroute.errors import ConfigError, InputError
from mmroute.tasks import _mvot_skin, _prompts, _skins
from mmroute.tasks._grid import Cell
from mmroute.tasks._items import Items
from mmroute.tasks._presets import level_of
from mmroute.tasks._schema import Choice, Hop, Sample, Spec, State
from mmroute.tasks._texts import BOS, EOS, IMAGE, MOVES, VISION_END, VISION_START, Words, board_text, coordinate

__all__ = ["Generated"]

MAX_PROBE_CELLS = 14
_MODES = ("cot", "direct", "latent", "image", "probe")
_WORDY = ("cot", "word", "direct")
"""Hop texts that end in the small models' `answer: X`."""
_GIVEN = re.compile(r"s\d+$|start$|\.$|(?:" + "|".join(MOVES) + ")$")


class Generated(Items):
    """A world with an exact simulator; see the module docstring."""

    boxes: ClassVar[bool] = False
    """Whether a hop is the box of what it looks at, in every style."""

    # ------------------------------------------------------------------ pictures

    def codes(self, spec: Spec, state: int = 0) -> Int[np.ndarray, "C C"]:
        """Atlas codes of every tile of the canvas after `state` hops, as int16."""
        return self._codes(spec, self.trace(spec)[state] if state else None)

    def _codes(self, spec: Spec, state: State | None) -> Int[np.ndarray, "C C"]:
        out = _skins.background(spec.seed, spec.canvas)
        self._on_board(spec, out)[:] = _skins.spread(self._board_codes(spec, state), self.cell_side)
        if spec.fog:
            out.reshape(-1)[list(spec.fog)] = _skins.FOG
        return out

    def _on_board(self, spec: Spec, canvas: np.ndarray) -> np.ndarray:
        """The board's part of an array of tiles."""
        (r, c), side = spec.offset, spec.n * self.cell_side
        return canvas[r : r + side, c : c + side]

    def cells(self, spec: Spec, codes: Int[np.ndarray, "C C"]) -> Int[np.ndarray, "n n"]:
        """Board codes cell by cell, from codes of the canvas; a cell with fog on any of its tiles is fog."""
        return _skins.gathered(self._on_board(spec, codes), self.cell_side)

    def draw(self, spec: Spec, state: State | None = None, skin: str | None = None) -> Image.Image:
        """The picture of a state; None is the state of the question."""
        if (skin or self.skin) == "mvot":
            return self._mvot(spec, self.trace(spec)[0] if state is None else state)
        step = 0 if state is None else state.step
        codes, look = self._codes(spec, state), self.preset.look
        return _skins.picture(codes, spec.seed + step, self.config.tile_px, self.noise, look, self.cell_side)

    def decode(self, image: Image.Image, spec: Spec, skin: str | None = None) -> State:
        """Which state a picture of this item shows; only the picture says where the agent is.

        Raises:
            InputError: no state of this item looks like that.
        """
        if (skin or self.skin) == "mvot":
            return _mvot_skin.nearest(image, self.trace(spec), lambda state: self._mvot(spec, state))
        return self._read(self.seen_cells(image, spec), spec)

    def seen_cells(self, image: Image.Image, spec: Spec) -> Int[np.ndarray, "n n"]:
        """Board codes that a picture of this item shows, cell by cell, whatever stands on them.

        Raises:
            InputError: the picture has another size.
        """
        px = self.config.tile_px
        if image.size != (spec.canvas * px, spec.canvas * px):
            raise InputError(f"the item has {spec.canvas} x {spec.canvas} tiles of {px} px, the picture {image.size}")
        top, left, side = spec.offset[0] * px, spec.offset[1] * px, spec.n * self.cell_side * px
        board = image.crop((left, top, left + side, top + side))
        return _skins.read(board, px * self.cell_side, self.preset.look)

    def _mvot(self, spec: Spec, state: State) -> Image.Image:
        raise ConfigError(f"{self.name} has no mvot skin; use --set task.skin=tiles")

    # ------------------------------------------------------------------ words

    def relevant(self, spec: Spec, hop: int) -> list[int]:
        """Tile ids that must be seen at a hop: 0 finds the start, 1 .. T are the hops, T + 1 is the answer."""
        return self.tiles(spec, self._looked_at(spec, hop))

    def words(self, spec: Spec, mode: Literal["cot", "direct", "latent", "probe"]) -> Words:
        """Prompt and response of the small models, word by word of the closed vocabulary."""
        picture = [VISION_START, *[IMAGE] * (spec.canvas * spec.canvas), VISION_END]
        head, question = [BOS, "task:", self.name], self.question_words(spec)
        image_first = self.config.prompt_order == "image_first"
        prompt = [*head, *(picture + question if image_first else question + picture), f"{mode}:"]
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
        """The coordinate word of a cell; of its first tile where it has four."""
        if self.coords == "board":
            return coordinate(*cell)
        return coordinate(*divmod(self.tile(spec, cell), spec.canvas))

    def first_step(self, spec: Spec) -> int:
        """The number of the first listed move, drawn up to `step_offset`."""
        most = self.config.step_offset
        return int(np.random.default_rng([spec.seed, 4]).integers(1, most + 1)) if most > 1 else 1

    def messages(self, sample: Sample, style: str | None = None) -> list[dict[str, Any]]:
        """The question as one chat message; blocks printed in order are the words of `words`.

        Args:
            sample: one of ours.
            style: `cot`, `direct`, `latent`, `image` or `probe` (the short words), `sentence` (plain English for
                general models, in the wording that the option `prompt` names), `para` or `mvot-like`.

        Raises:
            ConfigError: no such style, or a world that has no such wording.
        """
        style = style or "cot"
        image = {"type": "image", "image": sample.images[sample.prompt_images[0]]}
        if style in _prompts.WORDINGS:
            wording = self.config.prompt if style == "sentence" else style
            return [{"role": "user", "content": self._plain(sample, image, wording)}]
        if style not in _MODES:
            known = ", ".join((*_MODES, *_prompts.WORDINGS))
            raise ConfigError(f"messages has the styles {known} (given {style!r})")
        spec = Spec.from_dict(sample.meta["spec"])
        head, question = f"task: {self.name}", " ".join(self.question_words(spec))
        image_first = self.config.prompt_order == "image_first"
        before, after = (head, f"{question} {style}:") if image_first else (f"{head} {question}", f"{style}:")
        content = [{"type": "text", "text": before}, image, {"type": "text", "text": after}]
        return [{"role": "user", "content": content}]

    def _plain(self, sample: Sample, image: dict[str, Any], wording: str) -> list[dict[str, Any]]:
        if wording == "sentence":
            text = sample.question
        elif wording == "mvot-like":
            spec = Spec.from_dict(sample.meta["spec"])
            before, after = _prompts.mvot_like(self.name, self.listed(spec))
            return [{"type": "text", "text": before}, image, {"type": "text", "text": after}]
        else:
            spec = Spec.from_dict(sample.meta["spec"])
            if wording != "para":
                return _prompts.blocks(_prompts.read_template(wording), image, self.ask(spec))
            text = self.ask(spec).reworded(spec.seed % _prompts.NUM_PARAPHRASES)
        asked = {"type": "text", "text": text}
        return [image, asked] if self.config.prompt_order == "image_first" else [asked, image]

    def question(self, spec: Spec) -> str:
        """The question in plain English."""
        return self.ask(spec).plain()

    def listed(self, spec: Spec) -> list[str]:
        """All listed actions as phrases, `Go right.`; empty where a world lists none."""
        return []

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
        style, draws = self.config.hop_text, self.config.hop_images != "none"
        has_boxes = self.boxes or style == "box"
        hops = []
        for i, state in enumerate(trace[1:], start=1):
            cell = state.cell
            assert cell is not None  # a hop always ends somewhere
            hop = Hop(
                text=self._hop_text(spec, i, state),
                image=i if draws else -1,
                boxes=[self.box(spec, cell)] if has_boxes else [],
                box_image=0 if has_boxes else -1,
                state=self.at(spec, cell),
                relevant=self.relevant(spec, i),
            )
            hops.append(hop)
        choices = self.choices(spec)
        label = choices[spec.answer].label
        meta = {
            "spec": json.loads(spec.to_json()),
            "layout_hash": spec.layout_hash,
            "generator": f"{self.name}/{self.version}",
            "canvas": [spec.canvas, spec.canvas, self.config.tile_px] if self.skin == "tiles" else [],
            "board": self.board(spec),
            "relevant": {"start": self.relevant(spec, 0), "answer": self.relevant(spec, len(trace))},
            "skin": self.skin,
            "hop_images": self.config.hop_images,
            "source": "generated",
            "license": "CC0-1.0",
        }
        return Sample(
            id=f"{self.name}-v{self.version}-{spec.preset}-{spec.split}-{spec.index:06d}",
            task=self.name,
            split=spec.split,
            group=spec.group,
            question=self.question(spec),
            images=[self.draw(spec), *(self.draw(spec, state) for state in trace[1:] if draws)],
            prompt_images=[0],
            hops=hops,
            choices=choices,
            answer=label,
            answer_index=spec.answer,
            answer_text=f"answer: {self._answer_word(spec)}" if style in _WORDY else f"The answer is {label}.",
            difficulty=self._difficulty(spec, trace),
            meta=meta,
        )

    def box(self, spec: Spec, cell: Cell) -> list[float]:
        """The box of a cell: left, upper, right and lower edge, as shares of the canvas."""
        row, col = divmod(self.tile(spec, cell), spec.canvas)
        side = self.cell_side
        return [x / spec.canvas for x in (col, row, col + side, row + side)]

    def _hop_text(self, spec: Spec, hop: int, state: State) -> str:
        style, cell = self.config.hop_text, state.cell
        assert cell is not None
        if style == "cot":
            steps = self.chain(spec)
            head = len(steps) - (len(self.trace(spec)) - 1)  # steps before the first hop, e.g. `start r2c1 .`
            own = steps[head + hop - 1]
            return " ".join([w for step in steps[:head] for w in step] + own if hop == 1 else own)
        if style == "word":
            return self.at(spec, cell)
        if style == "vot":
            rows = [[self._seen(spec, (r, c)) for c in range(spec.n)] for r in range(spec.n)]
            return board_text(rows, cell)
        if style == "direct":
            return ""
        return self.describe(spec, hop, state, "action" if style == "action" else "sentence")

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

    # ------------------------------------------------------------------ what a world fills in

    @abstractmethod
    def trace(self, spec: Spec) -> list[State]:
        """The exact simulator: states 0 .. T."""

    @abstractmethod
    def choices(self, spec: Spec) -> list[Choice]:
        """The possible answers, in the order of `spec.answer`."""

    @abstractmethod
    def chain(self, spec: Spec) -> list[list[str]]:
        """The written chain in steps; the last T of them are the hops."""

    def outcomes(self, spec: Spec) -> list[list[str]]:
        """What each step of the chain comes to: its words less those that the question or the step before give.

        One word is one look-up, which a latent can learn to hold; a sentence is not.
        """
        return [[word for word in step if not _GIVEN.match(word)] for step in self.chain(spec)]

    def sentences(self, spec: Spec) -> list[list[str]]:
        """The chain in full sentences of the closed vocabulary, the way people write; here the chain as it is."""
        return self.chain(spec)

    @abstractmethod
    def ask(self, spec: Spec) -> _prompts.Question:
        """The question in plain English, in parts."""

    @abstractmethod
    def describe(self, spec: Spec, hop: int, state: State, style: str) -> str:
        """One hop in plain English: `sentence`, or the bare `action`."""

    @abstractmethod
    def question_words(self, spec: Spec) -> list[str]:
        """The question in words of the vocabulary, without task and mode."""

    @abstractmethod
    def _board_codes(self, spec: Spec, state: State | None) -> Int[np.ndarray, "n n"]:
        """Atlas codes of the board, one per cell; None is state 0."""

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

    def _answer_word(self, spec: Spec) -> str:
        return self.choices(spec)[spec.answer].label
