"""Figures of generated tokens that post-hoc gates rank by; computed once while collecting, so those gates run offline.

Source: mean, sum, minimum and quantile of log-probabilities (Gupta et al., arXiv 2404.10136); self-certainty
(arXiv 2502.18581); lowest window and tail (DeepConf, arXiv 2508.15260).

Legend: B rows, T generated tokens, V vocabulary, k alternatives a server names.
"""

import numpy as np
from jaxtyping import Bool, Float

__all__ = ["EARLY", "STATISTICS", "from_top", "statistics"]

EARLY = (8, 16, 64)
"""Numbers of first tokens that `lp_early_*` averages."""
STATISTICS = (
    "lp_mean",
    "lp_sum",
    "lp_min",
    "lp_q90",
    "ent_mean",
    "ent_max",
    "margin",
    "lp_answer",
    *(f"lp_early_{m}" for m in EARLY),
    "conf_tail",
    "conf_low",
)
_WINDOW, _TAIL = 256, 2048


def statistics(
    lp: Float[np.ndarray, "B T"],
    entropy: Float[np.ndarray, "B T"],
    margin: Float[np.ndarray, "B T"],
    real: Bool[np.ndarray, "B T"],
    answer: Bool[np.ndarray, "B T"] | None = None,
) -> dict[str, Float[np.ndarray, " B"]]:
    """Every figure of every row.

    Args:
        lp: log-probability of the token that was written.
        entropy: of the distribution it came from, in nats.
        margin: log-probability of the most likely token minus that of the second.
        real: which tokens there are; a row begins at column 0 and has one at least.
        answer: which tokens are the answer rather than the thought; None, or none in a row, is the last token.
    """
    count = real.sum(1)
    place = np.arange(lp.shape[1])
    last = place == count[:, None] - 1
    spans = last if answer is None else np.where((answer & real).any(1)[:, None], answer & real, last)
    loss = np.sort(np.where(real, -lp, np.inf), axis=1)
    at = 0.9 * (count - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, count - 1)
    rows = np.arange(len(lp))
    q90 = loss[rows, low] + (at - low) * (loss[rows, high] - loss[rows, low])
    out = {
        "lp_mean": _mean(lp, real),
        "lp_sum": np.where(real, lp, 0).sum(1),
        "lp_min": np.where(real, lp, np.inf).min(1),
        "lp_q90": -q90,
        "ent_mean": _mean(entropy, real),
        "ent_max": np.where(real, entropy, -np.inf).max(1),
        "margin": _mean(margin, real),
        "lp_answer": _mean(lp, spans),
    }
    out |= {f"lp_early_{m}": _mean(lp, real & (place < m)) for m in EARLY}
    out["conf_tail"] = _mean(lp, real & (place >= count[:, None] - _TAIL))
    out["conf_low"] = _lowest_window(lp, real, count)
    return out


def _mean(x: Float[np.ndarray, "B T"], over: Bool[np.ndarray, "B T"]) -> Float[np.ndarray, " B"]:
    return np.where(over, x, 0).sum(1) / np.maximum(over.sum(1), 1)


def _lowest_window(
    lp: Float[np.ndarray, "B T"], real: Bool[np.ndarray, "B T"], count: np.ndarray
) -> Float[np.ndarray, " B"]:
    """The least mean over any `_WINDOW` tokens in a row; over all of them where there are fewer."""
    sums = np.concatenate([np.zeros((len(lp), 1)), np.cumsum(np.where(real, lp, 0), axis=1)], axis=1)
    width = np.minimum(count, _WINDOW)[:, None]
    end = np.arange(1, lp.shape[1] + 1)[None]
    start = np.maximum(end - width, 0)
    means = (np.take_along_axis(sums, np.broadcast_to(end, real.shape), 1) - np.take_along_axis(sums, start, 1)) / width
    return np.where((end >= width) & (end <= count[:, None]), means, np.inf).min(1)


def from_top(top: Float[np.ndarray, "T k"]) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
    """Entropy and margin from the k best log-probabilities that a server gives, renormalised over those."""
    ranked = -np.sort(-top, axis=1)
    logs = ranked - np.log(np.exp(ranked).sum(1, keepdims=True))
    return -(np.exp(logs) * logs).sum(1), ranked[:, 0] - ranked[:, 1]
