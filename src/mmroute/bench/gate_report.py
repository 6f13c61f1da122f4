"""Writes what a gate bench found: JSON for programs, a table for people, and the two curves as one SVG."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mmroute.bench import schema
from mmroute.errors import MissingExtra

__all__ = ["lines", "write"]

_COLUMNS = (
    ("ONG", "ong", "{:.2f}"),
    ("APGR", "apgr", "{:.2f}"),
    ("CPT 80 %", "cpt80", "{:.2f}"),
    ("at 40 %", "accuracy_at_40", "{:.3f}"),
    ("over target", "gain_on_target_at_40", "{:+.3f}"),
    ("kappa", "kappa_at_40", "{:.2f}"),
    ("cost at 40 %", "cost_ratio_at_40", "{:.2f}"),
    ("lossless speed-up", "speed_up_lossless", "{:.2f}"),
    ("AIQ", "aiq", "{:.3f}"),
    ("nAUC", "nauc", "{:.3f}"),
    ("rank score", "rank_score_at_40", "{:.3f}"),
    ("realised share", "realised_share", "{:.3f}"),
    ("ties", "tie_rate", "{:.3f}"),
)


def write(result: dict[str, Any], out: Path) -> None:
    """`gate.json`, `gate.md` and, with matplotlib, `gate.svg` in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    schema.write_json(out / "gate.json", result)
    by_seed = [seed["gates"] for seed in result["seeds"].values()]
    schema.write_text(out / "gate.md", "\n".join(lines(by_seed)) + "\n")
    try:
        draw(by_seed, out / "gate.svg")
    except ImportError:
        raise MissingExtra("the picture", "matplotlib", "bench") from None


def lines(by_seed: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    """A Markdown table, means over seeds, the best normalised gain first; skipped gates with their reason below."""
    shown, skipped = {}, {}
    for title, first in by_seed[0].items():
        if first["skipped"]:
            skipped[title] = first["skipped"]
        else:
            shown[title] = [seed[title]["figures"] for seed in by_seed]
    order = sorted(shown, key=lambda title: -(_mean(shown[title], "ong") or 0.0))
    out = [
        "| gate | looks at | " + " | ".join(head for head, *_ in _COLUMNS) + " |",
        "|---" * (len(_COLUMNS) + 2) + "|",
    ]
    for title in order:
        cells = []
        for _, key, form in _COLUMNS:
            value = _mean(shown[title], key)
            cells.append("-" if value is None else form.format(value))
        out.append(f"| {title} | {by_seed[0][title]['needs']} | " + " | ".join(cells) + " |")
    out += [f"\nSkipped: {title}: {reason}" for title, reason in skipped.items()]
    return out


def _mean(figures: Sequence[dict[str, float | None]], key: str) -> float | None:
    values = [value for each in figures if (value := each.get(key)) is not None]
    return fmean(values) if len(values) == len(figures) else None


def draw(by_seed: Sequence[dict[str, dict[str, Any]]], path: Path) -> None:
    """Accuracy over the share of target calls, and over charged cost; means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    try:
        for title, first in by_seed[0].items():
            if first["skipped"]:
                continue
            curves = [seed[title]["curve"] for seed in by_seed]
            mean = {key: [fmean(v) for v in zip(*(c[key] for c in curves), strict=True)] for key in first["curve"]}
            strong = title.startswith(("prp", "oracle", "random"))
            style = {"linewidth": 2.2 if strong else 0.9, "alpha": 1.0 if strong else 0.6, "label": title}
            axes[0].plot(mean["share"], mean["accuracy"], **style)
            axes[1].plot(mean["cost"], mean["accuracy"], **style)
        axes[0].set_xlabel("share answered by the target")
        axes[1].set_xlabel("charged cost per query")
        axes[0].set_ylabel("accuracy")
        axes[1].legend(fontsize=6, ncol=2)
        figure.tight_layout()
        beside = path.with_name(f".{path.name}.part.svg")
        figure.savefig(beside, metadata={"Date": None})
        beside.replace(path)
    finally:
        plt.close(figure)
