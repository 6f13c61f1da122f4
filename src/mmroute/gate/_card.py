"""A rater on the Hub: its files as they are, and a model card whose figures come from result files.

    rater.push_to_hub("me/rater", results=["results/gate/prp-small--s0.json"], draft="me/draft", target="me/target")
    rater = Prp.from_pretrained("me/rater", draft="me/draft")

`rater.json` is not touched on the way: its hash is the rater's id, by which results name it.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmroute import repository
from mmroute.backbones.load import bundled
from mmroute.bench.gate_schema import GateEval, GateResult, read_gate, read_gate_eval
from mmroute.bench.schema import kind_of
from mmroute.errors import ConfigError
from mmroute.files import write_text
from mmroute.gate._manifest import WEIGHTS, Manifest
from mmroute.repository import is_hub_id
from mmroute.sharing import CARD, came_from

if TYPE_CHECKING:
    from mmroute.gate.prp import Prp

__all__ = ["card", "push", "write"]

OURS = "prp"
"""What a bench calls the recipe's own rater."""
_FORMS = {
    "suffix": "a learned position behind the prompt, read in the process of the draft",
    "tokens": "digits that the draft itself writes before its first thought, for any server",
}


def push(
    rater: "Prp",
    repo_id: str,
    *,
    results: Iterable[str | Path] = (),
    draft: str | None = None,
    target: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload a rater with mmroute",
) -> str:
    """Uploads what `Prp.save` writes, with a model card.

    Args:
        rater: with weights, on its draft.
        repo_id: `owner/name`; made if it is not there.
        results: result files of kind `gate/1` or `gate-eval/1` of this very rater, for the card.
        draft: Hub id of the draft; needed where training changed it, or it was loaded from a folder.
        target: Hub id of the target, for the card; likewise.
        private: as on the Hub; None is the owner's default.
        token: access token; None is the one of `hf auth login`.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: no Hub id, a draft that others cannot load, or results of another rater.
        MmrouteError: the Hub refused.
    """
    repository.check_id(repo_id)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rater.save(folder)
        found = Manifest.read(folder)
        named = draft or found.drafted_for
        if named is None or not (is_hub_id(named) or named in bundled()):
            why = "was changed by training" if named is None and found.pair else f"was loaded from {named!r}"
            raise ConfigError(f"the draft {why}, which others cannot load; push that model and pass draft='owner/name'")
        write(folder, results, repo_id, named, target)
        return repository.send(folder, repo_id, private=private, token=token, message=message)


def write(
    folder: Path, results: Iterable[str | Path], name: str = "", draft: str | None = None, target: str | None = None
) -> None:
    """Writes `README.md` beside the saved files; errors as in `card`."""
    found = Manifest.read(folder)
    artifact = found.id_with(b"" if found.is_written else (folder / WEIGHTS).read_bytes())
    read = [_read(Path(path)) for path in results]
    write_text(folder / CARD, card(found, artifact, read, name or folder.name, draft, target))


def card(
    found: Manifest,
    artifact: str,
    results: Sequence[GateResult | GateEval],
    name: str,
    draft: str | None = None,
    target: str | None = None,
) -> str:
    """The model card: what the rater is, how to use it, what it learned from, and what was measured.

    Args:
        found: `rater.json`.
        artifact: the rater's id.
        results: what was measured of it.
        name: of the repository, or of the folder.
        draft: how others name the draft; None is its name in training.
        target: likewise.

    Raises:
        ConfigError: a result measured another rater.
    """
    for result in results:
        measured = result.artifact if isinstance(result, GateResult) else result.summary.artifact
        if measured != artifact:
            raise ConfigError(
                f"the result measured the rater {measured or 'without an id'}, the card is of {artifact}; give results "
                "of the same rater"
            )
    draft, target = draft or found.drafted_for, target or found.pair.get("target")
    base = [f"base_model: {draft}"] if draft is not None and is_hub_id(draft) else []
    given = f', draft="{draft or "OUT/draft"}")' if draft is None or is_hub_id(draft) else ")"
    return "\n".join(
        [
            *["---", "library_name: mmroute", *base, "tags:", "- mmroute", "- query-routing", "- prp", "---", ""],
            *[f"# {name.rpartition('/')[2]}", ""],
            f"Says from the prompt alone, before anything is written, whether {_shown(draft)} will be right"
            + (f" and whether {_shown(target)} will" if found.config.get("num_ratings", 2) == 2 else "")
            + ". Neither model is in here.",
            *["", "```python", "from mmroute.gate.prp import Prp", ""],
            f'rater = Prp.from_pretrained("{name}"{given}',
            *["```", "", "```bash", f"mmroute serve --draft DRAFT --target TARGET --set rater={name}", "```", ""],
            *["## Pair and form", ""],
            f"- draft: {_shown(draft)}{_from(found)}, weights `{found.base}`; a draft with other weights is refused",
            f"- target: {_shown(target)}, weights `{found.pair.get('target_weights', 'not known')}`",
            f"- form `{found.config.get('form', 'suffix')}`: {_FORMS[found.config.get('form', 'suffix')]}",
            f"- options: `{json.dumps(found.config)}`",
            f"- id `{artifact}`, SHA-256 of its weights `{found.weights}`",
            *["", "## Trained on", "", *_trained(found)],
            *["", "## Measured", "", *_measured(results), ""],
        ]
    )


def _from(found: Manifest) -> str:
    before = found.pair.get("draft")
    return f", which training changed from {_shown(before)}" if found.has_own_draft and before is not None else ""


def _shown(name: str | None) -> str:
    if name is None:
        return "its draft"
    return name if is_hub_id(name) else f"`{Path(name).name}`"


def _trained(found: Manifest) -> list[str]:
    facts = found.facts
    if "train" not in facts:
        return ["Nothing is known about its training."]
    n, train = facts.get("n", {}), facts["train"]
    lines = [
        f"{n.get('all', train['n'])} questions that both models answered, {n.get('calibration', 'some')} of them kept "
        f"for calibration; objective `{train['objective']}`, {facts['epochs']} epochs, seed {train['seed']}; source at "
        f"commit {facts.get('commit') or 'unknown'}, outcomes `{facts['outcomes_sha256'][:16]}`.",
        "",
        *["| part | task | share | sizes | fog |", "|---|---|---|---|---|"],
    ]
    for part in facts.get("mix", []):
        sizes = "preset" if part.get("sizes") is None else "-".join(str(size) for size in part["sizes"])
        lines.append(
            f"| {part.get('name') or part['task']} | {part['task']} | {part['share']} | {sizes} | {part['fog']} |"
        )
    return lines


def _measured(results: Sequence[GateResult | GateEval]) -> list[str]:
    if not results:
        return ["Nothing was measured for this card."]
    evals = [r.summary for r in results if isinstance(r, GateEval)]
    benches = [r for r in results if isinstance(r, GateResult)]
    rows: list[str] = []
    if evals:
        rows += [
            "| recipe | n | on the target | accuracy [95 %] | draft | target | random | oracle | FLOPs | seconds |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(
                f"| {s.recipe} | {s.n} | {s.target_share:.3f} | {s.accuracy:.3f} [{s.ci95[0]:.3f}, {s.ci95[1]:.3f}] | "
                f"{s.accuracy_draft:.3f} | {s.accuracy_target:.3f} | {s.accuracy_random:.3f} | "
                f"{s.accuracy_oracle:.3f} | {s.cost_ratio:.3f} | {s.time_ratio:.2f} |"
                for s in evals
            ),
            "",
        ]
    for bench in benches:
        rows += [*_bench(bench), ""]
    note = "Random and oracle send the same share; FLOPs and seconds are over always-target, rating included."
    return [*rows, note, *came_from([r.run for r in results])]


def _bench(bench: GateResult) -> list[str]:
    """Accuracy by share of target calls, beside chance and perfect knowledge, and what the ratings are worth."""
    gates, claims = bench.pooled.gates, bench.claims
    ours, others = gates[OURS], [gates[title] for title in ("random", "oracle advantage") if title in gates]
    rows = ["| " + " | ".join(["on the target", "accuracy", *(each.title for each in others)]) + " |"]
    rows.append("|" + "---|" * (2 + len(others)))
    for share, accuracy in ours.at.items():
        values = [accuracy, *(each.at[share] for each in others)]
        rows.append(f"| {float(share):.0%} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    asked = bench.pooled
    rows += [
        "",
        f"- {asked.n} questions in {asked.groups} groups; always-draft {asked.accuracy_draft:.3f}, always-target "
        f"{asked.accuracy_target:.3f}.",
    ]
    if claims.oracle_gain is not None:
        low, high = claims.oracle_gain_ci95
        between = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
        rows.append(f"- Of the way from random to the oracle: {claims.oracle_gain:.3f}{between}.")
    if claims.flops_at_equal_accuracy is not None:
        rows.append(f"- FLOPs over always-target at its accuracy: {claims.flops_at_equal_accuracy:.3f}.")
    for side, figures in ours.ratings.items():
        auroc, ece = figures.get("auroc"), figures.get("ece")
        if auroc is not None and ece is not None:
            rows.append(f"- Rating of the {side}: AUROC {auroc:.3f}, ECE {ece:.3f}.")
    return rows


def _read(path: Path) -> GateResult | GateEval:
    """Raises `ConfigError` for a result of another kind."""
    kind = kind_of(path)
    if kind == "gate/1":
        return read_gate(path)
    if kind == "gate-eval/1":
        return read_gate_eval(path)
    raise ConfigError(f"{path} is a result of kind {kind!r}; a rater's card takes 'gate/1' and 'gate-eval/1'")
