"""Writes what a gate bench found: JSON for programs, tables for people, and the two curves as one SVG."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mmroute.bench import schema, table
from mmroute.bench.gate_schema import Claims, Figures, GateEval, GateResult, Judged
from mmroute.errors import MissingExtra

__all__ = ["draw", "evaluations", "lines", "section", "write"]

_COLUMNS = (
    ("APGR", "apgr", "{:.2f}"),
    ("CPT 50 %", "cpt50", "{:.2f}"),
    ("CPT 80 %", "cpt80", "{:.2f}"),
    ("at 40 %", "accuracy_at_40", "{:.3f}"),
    ("over target", "gain_on_target_at_40", "{:+.3f}"),
    ("kappa", "kappa_at_40", "{:.2f}"),
    ("cost at 40 %", "cost_ratio_at_40", "{:.2f}"),
    ("lossless speed-up", "speed_up_lossless", "{:.2f}"),
    ("AIQ", "aiq", "{:.3f}"),
    ("nAUC", "nauc", "{:.3f}"),
    ("rank score", "rank_score_at_40", "{:.3f}"),
    ("ties", "tie_rate", "{:.3f}"),
)
_OF_RATINGS = (("ECE", "ece"), ("Brier", "brier"), ("AUROC", "auroc"), ("ties", "tie_rate"))
_OF_LEVELS = (("levels", "levels", "{:.0f}"), ("largest share", "largest_share", "{:.2f}"))


def write(result: GateResult, out: Path) -> None:
    """`gate.json` and `gate.svg` in a folder.

    Raises:
        MissingExtra: matplotlib is not installed; the JSON is written all the same.
    """
    schema.write_result(out / "gate.json", result)
    try:
        draw(result.pooled.gates, out / "gate.svg")
    except ImportError:
        raise MissingExtra("the picture", "matplotlib", "bench") from None


def section(result: GateResult) -> list[str]:
    """The result as Markdown, without a heading."""
    pooled, ours = result.pooled, result.pooled.gates["prp"]
    return [
        f"Pair {result.pair['draft']} and {result.pair['target']}, {pooled.n} held-out questions of seeds "
        f"{', '.join(result.seeds)} in {pooled.groups} images; draft {pooled.accuracy_draft:.3f}, target "
        f"{pooled.accuracy_target:.3f}. FLOPs of an answer: {pooled.flops_draft:.3g} and {pooled.flops_target:.3g}. "
        f"Supervised gates were fitted on {result.train} others. Intervals draw whole images, 95 %.",
        "",
        *_said(result.claims),
        "",
        *lines(pooled.gates),
        "",
        *_ratings(pooled.gates),
        "",
        "Asked and realised share of target calls, by the budget policy in the order of arrival: "
        + ", ".join(f"{asked}: {share:.3f}" for asked, share in ours.realised.items())
        + ".",
        "",
        "ONG by seed: "
        + ", ".join(
            f"{seed}: {_cell(each.gates['prp'].figures, 'ong', '{:.3f}')}" for seed, each in result.seeds.items()
        )
        + ".",
    ]


def evaluations(results: Sequence[GateEval]) -> list[str]:
    """Evaluations of raters and policies, a line each."""
    rows = []
    for found in (result.summary for result in results):
        low, high = found.ci95
        rows.append([
            found.recipe, str(found.seed), str(found.n), _number(found.budget, "{:.2f}"), f"{found.target_share:.3f}",
            f"{found.accuracy:.3f} [{low:.3f}, {high:.3f}]",
            *(f"{value:.3f}" for value in (found.accuracy_draft, found.accuracy_target, found.accuracy_random,
                                           found.accuracy_oracle)),
            _number(found.oracle_normalised_gain, "{:.3f}"),
            f"{found.cost_ratio:.3f}", f"{found.time_ratio:.3f}", f"{found.rating_overhead:.2f}",
        ])  # fmt: skip
    head = ["recipe", "seed", "n", "asked share", "realised", "accuracy [95 %]", "draft", "target", "random", "oracle",
            "ONG", "FLOPs", "seconds", "rating (decode steps)"]  # fmt: skip
    return table.markdown(head, rows).splitlines()


def _said(claims: Claims) -> Iterator[str]:
    low, high = claims.oracle_gain_ci95
    gain = _range(claims.oracle_gain, low, high, "{:.3f}")
    yield (
        f"- The rater goes {gain} of the way from random to the oracle; who knows every kind of question by heart, and "
        f"nothing of the single one, {_number(claims.attainable, '{:.3f}')}."
    )
    over = _range(claims.accuracy_over_target_at_40, *claims.accuracy_over_target_at_40_ci95, "{:+.3f}")
    yield f"- With 60 % of the questions on the draft, accuracy less always-target's: {over}."
    yield (
        f"- At always-target's accuracy: {_number(claims.flops_at_equal_accuracy, '{:.3f}')} of its FLOPs, "
        f"{_number(claims.time_at_equal_accuracy, '{:.3f}')} of its seconds, question by question, and "
        f"{_number(claims.time_at_equal_accuracy_together, '{:.3f}')} in a batch."
    )
    yield (
        f"- A rating takes {_number(claims.rating_decode_steps, '{:.2f}')} decode steps of the draft, and "
        f"{claims.rating_flops:.4f} of its prefill's FLOPs."
    )
    yield "- Not below the rater: " + (", ".join(claims.not_ahead) or "no gate at any share from 20 to 80 %") + "."


def lines(gates: Mapping[str, Judged]) -> list[str]:
    """A Markdown table, the best normalised gain first; skipped gates with their reason below."""
    shown = sorted((g for g in gates.values() if not g.skipped), key=lambda g: -(g.figures["ong"] or 0.0))
    rows = [
        [
            each.title,
            each.needs,
            _range(each.figures["ong"], *each.intervals.get("ong", (None, None)), "{:.3f}"),
            *(_cell(each.figures, key, form) for _, key, form in _COLUMNS),
        ]
        for each in shown
    ]
    head = ["gate", "looks at", "ONG", *(name for name, *_ in _COLUMNS)]
    skipped = [f"\nSkipped: {each.title}: {each.skipped}" for each in gates.values() if each.skipped]
    return [*table.markdown(head, rows).splitlines(), *skipped]


def _ratings(gates: Mapping[str, Judged]) -> list[str]:
    """What ratings are worth as probabilities."""
    rows = [
        [
            each.title,
            model,
            *(_cell(found, key, "{:.3f}") for _, key in _OF_RATINGS),
            *(_cell(found, key, form) for _, key, form in _OF_LEVELS),
        ]
        for each in gates.values()
        if each.needs != "outcome"
        for model, found in each.ratings.items()
    ]
    head = ["rating", "of", *(name for name, _ in _OF_RATINGS), *(name for name, *_ in _OF_LEVELS)]
    return table.markdown(head, rows).splitlines()


def _cell(figures: Figures, key: str, form: str) -> str:
    return _number(figures.get(key), form)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _range(value: float | None, low: float | None, high: float | None, form: str) -> str:
    if low is None or high is None:
        return _number(value, form)
    return f"{_number(value, form)} [{form.format(low)}, {form.format(high)}]"


def draw(gates: Mapping[str, Judged], path: Path) -> None:
    """Accuracy over the share of target calls (deferral), and over charged cost."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    try:
        for title, each in gates.items():
            if each.skipped:
                continue
            strong = title.startswith(("prp", "oracle", "attainable", "random"))
            style = {"linewidth": 2.2 if strong else 0.9, "alpha": 1.0 if strong else 0.6, "label": title}
            axes[0].plot(each.curve["share"], each.curve["accuracy"], **style)
            axes[1].plot(each.curve["cost"], each.curve["accuracy"], **style)
        axes[0].set_xlabel("share answered by the target")
        axes[1].set_xlabel("charged cost per query")
        axes[0].set_ylabel("accuracy")
        axes[1].legend(fontsize=6, ncol=2)
        figure.tight_layout()
        beside = path.with_name(f".{path.name}.part.svg")
        with matplotlib.rc_context({"svg.hashsalt": "mmroute"}):  # else ids differ from run to run
            figure.savefig(beside, metadata={"Date": None})
        beside.replace(path)
    finally:
        plt.close(figure)
