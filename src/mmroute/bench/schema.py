"""Result files: what all of them share, and `result/1` of an evaluation. Plain data, read strictly.

The engine's stand in `bench.engine_schema`, those of gates and of the gateway in `bench.gate_schema`.

A file is written beside and renamed, never edited afterwards. Reading one with an unknown field, or without a required
one, fails: a table must not be made of numbers whose meaning has drifted.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from mmroute.config import options, parse, resolved
from mmroute.errors import InputError
from mmroute.files import replacing, write_json
from mmroute.origin import Machine, Run, commit_of_source, machine_here, origin_here, run_here

__all__ = [
    "Baseline",
    "Budget",
    "Cost",
    "Dataset",
    "Infeasible",
    "Machine",
    "Method",
    "Model",
    "Quality",
    "Ratios",
    "Result",
    "Run",
    "Summary",
    "Task",
    "Time",
    "commit_of_source",
    "kind_of",
    "machine_here",
    "origin_here",
    "read_as",
    "read_infeasible",
    "read_plain",
    "read_result",
    "run_here",
    "write_json",
    "write_result",
    "write_text",
]

T = TypeVar("T")
Numbers = dict[str, float]


@options
class Model:
    id: str
    family: str
    layers: int
    weights_sha256: str = ""
    trained: str = "none"
    """`none`, or the recipe's `trained`: bundled name or folder of its routers and new weights."""


@options
class Budget:
    """What a row of a bench was asked to keep."""

    unit: Literal["v_eff_share", "kv_share"]
    """Share of vision positions that run, or (cache-only methods) whose keys stay, as the mean over all layers."""
    vision: float
    text: float


@options
class Method:
    recipe: str
    prune: str
    think: str
    config: dict[str, Any]
    """Resolved options of all parts."""
    needs: list[str]
    checked: str
    """How the fidelity of a peer's method was checked, as its file says."""
    deepen: str = "none"
    gate: str = "none"
    row: str = ""
    """Name of the method in its bench."""
    budget: Budget | None = None
    control: str = ""
    """Result file, in the same folder, of random positions at this run's counts in every layer, hop and modality."""


@options
class Dataset:
    """The published data that a task's items are read from."""

    id: str
    """On the Hub, or the name of the file."""
    revision: str
    """The Hub's commit, or `sha256:` of the files; empty if unknown."""
    labels: str
    """Which labels, where several are about."""


@options
class Task:
    name: str
    preset: str
    split: str
    n: int
    seed: int
    ids_sha256: str
    """Of the item ids in order: two results with equal hashes may be compared pairwise."""
    scorer: str
    needed_share: float | None = None
    background_share: float | None = None
    hop_images: str = "none"
    """Whether the task shows a picture after every hop."""
    context: str = "accumulate"
    """What of these pictures the model still sees at a later hop."""
    min_hops: int = 0
    """Items whose chain has fewer hops were passed over."""
    groups: str = ""
    """Sizes, in order, of the groups of items that succeed and fail together: "4,4,4"."""
    protocol: str = ""
    """`generate`, or `likelihood`: the option whose words the model finds most likely. Older files do not say."""
    dataset: Dataset | None = None
    """None of a generated task."""


@options
class Quality:
    accuracy: float
    wilson95: tuple[float, float]
    correct: str
    """0 or 1 per item, in order of the ids."""
    parsed: float
    """Share of answers the scorer could read."""
    by_level: Numbers = dataclasses.field(default_factory=dict)
    by_hops: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """By hops of the right chain: right answers, and items. Older files do not say."""
    predicted: str = ""
    """Per item the index of the choice that was answered, "-" where none was: one character each."""
    exact: str = ""
    """0 or 1 per item: every word of the right chain was the most likely one; empty where none is known."""
    forced: str = ""
    """0 or 1 per item: teacher-forced, the answer is right behind the right chain; empty where not asked."""
    metrics: Numbers = dataclasses.field(default_factory=dict)
    """The usual figures of a public benchmark, such as `pair_accuracy`, and `field/value`: the accuracy of a part."""


@options
class Cost:
    """Means per item, of the text model unless said otherwise."""

    flops_prefill: float
    flops_decode: float
    flops_extra: float
    flops_lm_head: float
    flops_answer: float
    """The sum of the four above."""
    flops_tower: float | None
    v_eff: float
    t_eff: float
    keep: Numbers
    """Realised share of vision and text positions, over all layers."""
    kv_bytes_prefill: float
    kv_bytes_peak: float
    kv_bytes_end: float
    ar_steps: float
    kv_bytes_by_hop: list[float] = dataclasses.field(default_factory=list)
    """[hop]: live once the hop is over, of the items that have it."""
    items_by_hop: list[int] = dataclasses.field(default_factory=list)
    """[hop]: how many items have it."""
    keep_map: dict[str, list[list[float | None]]] = dataclasses.field(default_factory=dict)
    """`vision`, `text`: [hop][layer] share of the hop's positions that ran; `kv`: [hop][layer] share of all positions
    so far that are cached once the hop is over. null where the hop has none."""


@options
class Time:
    """Interleaved with the baseline, batch 1, forced length."""

    prefill_s: Numbers
    """median, p10, p90, min, max, n; prefill without the vision tower."""
    decode_s_per_token: Numbers
    tower_s: Numbers
    forced_tokens: int
    batch: int
    items: int
    clock: Literal["thread", "wall", "cuda"]
    ratio: dict[str, Numbers] = dataclasses.field(default_factory=dict)
    """`prefill`, `decode`: of paired rounds, this one over the baseline."""
    realised_saving: float | None = None


@options
class Baseline:
    """The paired comparison with another result on the same items."""

    recipe: str
    diff: float
    ci95: tuple[float, float]
    only_ours: int
    only_theirs: int
    mcnemar_p: float
    not_worse_at_1_point: bool


@options
class Result:
    """One configuration on one task."""

    run: Run
    machine: Machine
    model: Model
    method: Method
    task: Task
    quality: Quality
    cost: Cost
    time: Time | None = None
    baseline: Baseline | None = None
    reported: None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    schema: Literal["result/1"] = "result/1"


@options
class Infeasible:
    """A row of a bench that cannot be met: printed as such, never moved to another budget."""

    row: str
    recipe: str
    budget: Budget
    layers: int
    reason: str
    schema: Literal["infeasible/1"] = "infeasible/1"


@options
class Ratios:
    """This recipe over the baseline."""

    flops: float
    kv_bytes: float
    prefill: float
    decode: float


@options
class Summary:
    """The one line that `mmroute eval --json` ends with. All costs are means per item."""

    task: str
    recipe: str
    model: str
    n: int
    accuracy: float
    ci95: tuple[float, float]
    flops: float
    kv_bytes: float
    """At the end of the answer."""
    ar_steps: float
    prefill_s: float
    decode_s_per_token: float
    keep: Numbers
    seed: int
    commit: str
    baseline: "Summary | None" = None
    ratio: Ratios | None = None
    metrics: Numbers = dataclasses.field(default_factory=dict)
    """As in the result file's `quality`."""
    dataset: Dataset | None = None

    def to_dict(self) -> dict[str, Any]:
        """Without `baseline` and `ratio` where nothing was compared, `metrics` and `dataset` where a task has none."""
        plain = resolved(self)
        if self.dataset is None:
            del plain["metrics"], plain["dataset"]
        if self.baseline is None:
            del plain["baseline"], plain["ratio"]
        else:
            plain["baseline"] = self.baseline.to_dict()
        return plain


def write_text(path: Path, text: str) -> None:
    """Writes one file, and its folder where it is missing, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_result(path: Path, result: Any) -> None:
    """Writes a result file, of a class of this module or of its siblings, whole or not at all."""
    write_json(path, resolved(result))


def read_result(path: Path) -> Result:
    """An evaluation's result file.

    Raises:
        InputError: not JSON, or of another schema.
        ConfigError: an unknown field, a missing one, or one of another type.
    """
    return read_as(path, Result, "result/1")


def read_infeasible(path: Path) -> Infeasible:
    """A row of a bench that cannot be met; errors as in `read_result`."""
    return read_as(path, Infeasible, "infeasible/1")


def kind_of(path: Path) -> str:
    """The `schema` a file names.

    Raises:
        InputError: not a JSON object, or one without a schema.
    """
    return str(read_plain(path)["schema"])


def read_plain(path: Path) -> dict[str, Any]:
    """A result file as it stands, for kinds that have no class.

    Raises:
        InputError: not a JSON object, or one without a schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a result file: {error}; write it again with the command that made it") from None
    if not isinstance(data, dict) or "schema" not in data:
        raise InputError(f"{path}: not a result file: it names no schema")
    return data


def read_as(path: Path, cls: type[T], schema: str) -> T:
    """A result file of the class that its schema names; errors as in `read_result`."""
    data = read_plain(path)
    if data["schema"] != schema:
        raise InputError(f"{path}: schema {data['schema']!r} given, expected {schema!r}")
    return parse(cls, data, path.name)
