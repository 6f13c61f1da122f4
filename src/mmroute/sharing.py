"""Routers on the Hub: the two saved files and a model card whose figures come from result files.

    routed.push_to_hub("me/maze-router", results=["results/spatial/maze-dare-lh.json"])
    routed = mmroute.from_pretrained("me/maze-router")

What a rating says which model answers is shared in the same way, by `gate.prp`.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmroute import repository
from mmroute.backbones.load import bundled
from mmroute.bench.schema import Result, Run, read_result
from mmroute.engine import saving
from mmroute.errors import ConfigError
from mmroute.files import write_text
from mmroute.repository import is_hub_id

__all__ = ["CARD", "came_from", "card", "push", "write_card"]

CARD = "README.md"


def push(
    routed: Any,
    repo_id: str,
    *,
    results: Iterable[str | Path] = (),
    base: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload routing parts with mmroute",
) -> str:
    """Uploads what `save_pretrained` writes, with a model card.

    Args:
        routed: an attached model.
        repo_id: `owner/name`; made if it is not there.
        results: result files (`mmroute eval --out`) of this very method, for the card.
        base: Hub id of the model it was made for; needed where that was loaded from a folder.
        private: as on the Hub; None is the owner's default.
        token: access token; None is the one of `hf auth login`.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: no Hub id, a base that others cannot load, or results of another method.
        MmrouteError: the Hub refused.
    """
    repository.check_id(repo_id)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        saving.save(routed, folder)
        manifest = saving.read_manifest(folder)
        named = base or manifest.base.get("id")
        if named is None or not (is_hub_id(named) or named in bundled()):
            raise ConfigError(
                f"the base model was loaded from {named!r}, which others cannot load; pass base='owner/name'"
            )
        data = json.loads((folder / saving.MANIFEST).read_text(encoding="utf-8"))
        if base is not None and base != data["base"]["id"]:
            data["base"] = {"id": base, "revision": None}
            write_text(folder / saving.MANIFEST, json.dumps(data, indent=1) + "\n")
        write_card(folder, results, repo_id)
        return repository.send(folder, repo_id, private=private, token=token, message=message)


def write_card(folder: Path, results: Iterable[str | Path], name: str = "") -> None:
    """Writes `README.md` beside the saved parts; errors as in `card`."""
    found = [read_result(Path(path)) for path in results]
    write_text(folder / CARD, card(saving.read_manifest(folder), found, name or folder.name))


def card(manifest: saving.Manifest, results: Sequence[Result], name: str) -> str:
    """The model card: what it is, how to use it, and what was measured, with where each figure comes from.

    Raises:
        ConfigError: a result measured another method.
    """
    for result in results:
        _check_same(manifest, result)
    base = manifest.base.get("id") or ""
    shown = base if is_hub_id(base) else f"`{Path(base).name}`" if base else "a model without a name"
    methods = [m for m in (manifest.prune, manifest.deepen) if m is not None]
    tags = ["mmroute", "token-routing", *(m.name for m in methods if ":" not in m.name)]
    head = ["---", "library_name: mmroute", *(["base_model: " + base] if is_hub_id(base) else []), "tags:"]
    what = " and ".join(f"`{m.name}`" for m in methods) or "nothing"
    lines = [
        *head,
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {name.rpartition('/')[2]}",
        "",
        f"Routing parts ({what}) for {shown} ({manifest.family}, {manifest.shape['layers']} layers). The base model is",
        "not in here.",
        "",
        "```python",
        "import mmroute",
        "",
        f'routed = mmroute.from_pretrained("{name}")',
        'answer = routed.answer("Which exit is reached?", images=["maze.png"])',
        "```",
        "",
        "## Options",
        "",
        *(f"- `{m.name}`: `{json.dumps(m.config)}`" for m in methods),
        "",
        "## Measured",
        "",
        *_table(results),
        "",
        f"Made with {', '.join(f'{k} {v}' for k, v in manifest.versions.items())}.",
        "",
    ]
    return "\n".join(lines)


def _table(results: Sequence[Result]) -> list[str]:
    if not results:
        return ["Nothing was measured for this card."]
    rows = [
        "| task | n | accuracy [95 %] | vision kept | text kept | FLOPs an answer | KV bytes at end | to unrouted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        low, high = r.quality.wilson95
        against = "not compared"
        if r.baseline is not None:
            a, b = r.baseline.ci95
            against = f"{r.baseline.diff:+.3f} [{a:+.3f}, {b:+.3f}] to `{r.baseline.recipe}`"
        rows.append(
            f"| {r.task.name} ({r.task.split}) | {r.task.n} | {r.quality.accuracy:.3f} [{low:.3f}, {high:.3f}] | "
            f"{r.cost.keep.get('vision', 1):.2f} | {r.cost.keep.get('text', 1):.2f} | {r.cost.flops_answer:.3g} | "
            f"{r.cost.kv_bytes_end:.0f} | {against} |"
        )
    return [*rows, *came_from([r.run for r in results])]


def came_from(runs: Sequence[Run]) -> list[str]:
    """Lines of a card: which command, on which source, made its figures."""
    lines = [f"- `{r.command}` at commit {r.commit or 'unknown'}{' with changes' if r.dirty else ''}" for r in runs]
    return ["", "From:", "", *lines]


def _check_same(manifest: saving.Manifest, result: Result) -> None:
    saved = replace(manifest.prune, rates=None) if manifest.prune is not None else None
    measured = result.method.config.get("prune")
    name = saved.name if saved is not None else "none"
    if result.method.prune != name or (saved is not None and measured is not None and measured != saved.config):
        raise ConfigError(
            f"the result measured {result.method.prune} {measured}, the card is of {name} "
            f"{saved.config if saved is not None else ''}; give results of the same method and options"
        )
