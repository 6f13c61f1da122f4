"""Figures of generated tokens against plain loops over each row."""

import numpy as np
import pytest

from mmroute.gate import _statistics
from mmroute.gate._statistics import EARLY, STATISTICS, from_top, statistics


def slow(lp: np.ndarray, ent: np.ndarray, margin: np.ndarray, answer: np.ndarray, window: int, tail: int) -> dict:
    windows = [lp[i : i + window].mean() for i in range(max(1, len(lp) - window + 1))]
    return {
        "lp_mean": lp.mean(),
        "lp_sum": lp.sum(),
        "lp_min": lp.min(),
        "lp_q90": -np.quantile(-lp, 0.9),
        "ent_mean": ent.mean(),
        "ent_max": ent.max(),
        "margin": margin.mean(),
        "lp_answer": lp[answer].mean() if answer.any() else lp[-1],
        **{f"lp_early_{m}": lp[:m].mean() for m in EARLY},
        "conf_tail": lp[-tail:].mean(),
        "conf_low": min(windows),
    }


@pytest.mark.parametrize("window", [3, 256])
def test_a_padded_batch_gives_each_row_its_own_figures(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_statistics, "_WINDOW", window)
    monkeypatch.setattr(_statistics, "_TAIL", 5)
    rng = np.random.default_rng(0)
    counts = [1, 2, 9, 20]
    lp, ent, margin = -rng.random((4, 20)), rng.random((4, 20)), rng.random((4, 20))
    real = np.arange(20) < np.array(counts)[:, None]
    answer = np.zeros_like(real)
    answer[2, 6:8] = answer[3, 17:19] = True
    got = statistics(np.where(real, lp, np.nan), ent, margin, real, answer)
    assert set(got) == set(STATISTICS)
    for row, n in enumerate(counts):
        want = slow(lp[row, :n], ent[row, :n], margin[row, :n], answer[row, :n], window, 5)
        for name, value in want.items():
            assert got[name][row] == pytest.approx(value, abs=1e-12), (name, row)


def test_servers_alternatives_are_renormalised() -> None:
    probs = np.array([[0.1, 0.6, 0.2], [0.3, 0.3, 0.3]])
    entropy, margin = from_top(np.log(probs))
    share = probs / probs.sum(1, keepdims=True)
    np.testing.assert_allclose(entropy, -(share * np.log(share)).sum(1))
    np.testing.assert_allclose(margin, [np.log(3), 0], atol=1e-12)
