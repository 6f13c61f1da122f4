"""Items of a generated world, without pixels and words: options, seeds, presets, splits, counterbalanced units.

Legend: C tiles of one side of the canvas, n cells of one side of the board.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from mmroute.config import options, parse
from mmroute.errors import ConfigError
from mmroute.tasks._grid import SPLITS, Cell, Split
from mmroute.tasks._presets import PRESETS, Preset, plan
from mmroute.tasks._schema import Spec
from mmroute.tasks._task import Task

__all__ = ["Items"]


class Items(Task):
    """What `Generated` knows about an item before it is drawn or written down."""

    @options
    class Config:
        preset: str = "small"
        variant: Literal["auto", "quad", "stream", "mvot"] = "auto"
        """`auto` is the stream for train and counterbalanced items for val and test."""
        skin: Literal["auto", "tiles", "mvot"] = "auto"
        """`auto` is the preset's own."""
        walls: Literal["tiles", "edges"] = "tiles"
        """Mazes only: a wall is a tile, or a line between two cells."""
        hop_images: Literal["none", "observed", "generated"] = "none"
        """The picture after every hop: `observed` enters the context, `generated` is for the model to draw."""
        hop_text: Literal["cot", "sentence", "action", "word", "vot", "box", "direct"] = "cot"
        """How a hop is written: the small models' words, plain English, the bare action, the place alone, the board as
        text, plain English with a box, or not at all."""
        prompt: str = "sentence"
        """Wording for general models: sentence, para, mvot-like, or a file with {image}, {question} and so on."""
        prompt_order: Literal["image_first", "question_first"] = "image_first"
        coords: Literal["auto", "canvas", "board"] = "auto"
        """`auto` counts from the canvas with tiles and from the board with the mvot skin."""
        tile_px: Annotated[int, Field(ge=14, le=64)] = 28
        """Side of one tile in pixels: one vision token of the model after merging."""
        tokens_per_cell: Literal[1, 4] = 1
        """4 draws a board cell over 2 x 2 tiles."""
        noise: Annotated[float, Field(ge=0, le=0.05)] | None = None
        """Standard deviation in units of full scale; None is the preset's."""
        solvable: Literal["all", "none"] = "all"
        """`none` fogs what decides, in val and test only."""
        step_offset: Annotated[int, Field(ge=1, le=8)] = 1
        """Listed moves are numbered from a random step in 1 .. this, so that late step words are trained too."""
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
        natural = "canvas" if self.skin == "tiles" else "board"
        self.coords: str = natural if self.config.coords == "auto" else self.config.coords
        self.cell_side = 2 if self.config.tokens_per_cell == 4 else 1
        """Tiles of one side of a cell."""
        self._last: dict[tuple[str, int], list[Spec]] = {}

    # ------------------------------------------------------------------ items

    @property
    def sizes(self) -> tuple[int, ...]:
        """Board sides of this preset."""
        largest = min(self.preset.sizes[1], self.preset.canvas // self.cell_side)
        return tuple(range(self.preset.sizes[0], largest + 1))

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
        size, length = plan(rng, preset, self._fitting(preset, streams), self.name, self.levels)
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
        return PRESETS[name if self._fitting(PRESETS[name], False) else "small"], False

    def _fitting(self, preset: Preset, streams: bool) -> list[tuple[int, int]]:
        """The pairs of the world whose board fits on the canvas."""
        return [(n, h) for n, h in self._pairs(preset, streams) if n * self.cell_side <= preset.canvas]

    def _fogged(self, spec: Spec) -> Spec:
        return dataclasses.replace(spec, fog=tuple(self.tiles(spec, self._decisive(spec))))

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
        row, col = (int(x) for x in rng.integers(preset.canvas - n * self.cell_side + 1, size=2))
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

    # ------------------------------------------------------------------ places

    def tile(self, spec: Spec, cell: Cell) -> int:
        """Canvas tile id of a board cell; of its first tile where it has four."""
        row, col = (spec.offset[axis] + cell[axis] * self.cell_side for axis in (0, 1))
        return row * spec.canvas + col

    def tiles(self, spec: Spec, cells: Iterable[Cell]) -> list[int]:
        """All tile ids of some board cells, sorted, each once."""
        inner = [r * spec.canvas + c for r in range(self.cell_side) for c in range(self.cell_side)]
        return sorted({self.tile(spec, cell) + i for cell in cells for i in inner})

    def board(self, spec: Spec) -> list[int]:
        """All tile ids of the board."""
        return self.tiles(spec, [(r, c) for r in range(spec.n) for c in range(spec.n)])

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
    def _decisive(self, spec: Spec) -> Iterable[Cell]:
        """Cells whose fog leaves the answer a guess."""
