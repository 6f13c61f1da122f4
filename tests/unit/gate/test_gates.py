"""Every gate of the folder on made evidence: each finds what its kind of evidence shows, and asks for no more."""

import dataclasses

import numpy as np
import pytest

from mmroute import hub
from mmroute.bench.reliability import auroc
from mmroute.errors import InputError
from mmroute.gate._features import Features, Logistic, held_out
from mmroute.gate.base import Continuation, Evidence, Known, Prefill, Query

HARD = "which of these many doors opens"
EASY = "what colour is this"
ASKED = ("verbalised_pre", "verbalised_post")


def made(n: int = 400, seed: int = 0) -> list[Evidence]:
    """Hard questions have other words, a direction in the hidden state, and unsure answers."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        hard = bool(rng.random() < 0.5)
        right = bool(rng.random() < (0.15 if hard else 0.9))
        sure = -0.1 - 0.8 * (not right) + rng.normal(0, 0.1)
        last = rng.normal(size=(3, 8))
        last[1, 2] += 4 * (not hard)
        last[2, 4] += 4 * (not hard)
        names = (
            "lp_mean",
            "lp_sum",
            "lp_min",
            "lp_q90",
            "margin",
            "lp_answer",
            "lp_early_8",
            "lp_early_16",
            "conf_tail",
        )
        stats = dict.fromkeys((*names, "lp_early_64", "conf_low"), sure) | {"ent_mean": -sure, "ent_max": -sure}
        labels = [("A" if right or rng.random() < 0.4 else "BCD"[int(rng.integers(3))]) for _ in range(8)]
        answer = Continuation("so it is red" if right else "maybe blue", "A", stats, last=last[2] + 3 * right)
        out.append(
            Evidence(
                Query(f"q{i}", task="t", group=f"g{i // 2}", prompt_tokens=40 + 10 * hard, image_tokens=16,
                      text=HARD if hard else EASY, pixels=(0.5, float(hard))),
                session=Prefill(last, last),
                early=answer,
                answer=answer,
                samples=[Continuation(label=label) for label in labels],
                replies={"p_true": 0.9 if right else 0.3, "automix": 0.75 if right else 0.5}
                | dict.fromkeys(ASKED, 40 + 20 * right),
                outcome=Known(float(right), 0.9),
            )
        )  # fmt: skip
    return out


GATES = [
    ("logprob", {"stat": s})
    for s in ("mean", "sum", "min", "quantile", "entropy", "max_entropy", "margin", "answer", "tail", "lowest")
] + [
    ("early", {}),
    ("self_consistency", {}),
    ("self_consistency", {"measure": "entropy"}),
    ("p_true", {}),
    ("verbalised", {"when": "pre"}),
    ("verbalised", {"when": "post"}),
    ("probe", {}),
    ("probe", {"at": "mean", "heads": 2}),
    ("self_ref", {"when": "post"}),
    ("self_ref", {"when": "pre"}),
    ("difficulty", {}),
    ("hybrid", {}),
    ("hybrid", {"slack": "spread"}),
    ("knn", {}),
    ("mf", {}),
    ("frugal", {}),
    ("automix", {}),
    ("length", {}),
    ("oracle", {}),
    ("oracle", {"by": "difficulty"}),
]
FIELDS = {
    "nothing": (),
    "prefill": ("session",),
    "early": ("session", "early"),
    "answer": ("session", "answer"),
    "samples": ("session", "samples"),
    "outcome": ("outcome",),
}


def only(evidence: list[Evidence], needs: str, asked: list[str]) -> list[Evidence]:
    """What the harness would hand to a gate that asks for this, and nothing else."""
    return [
        Evidence(
            e.query,
            **{name: getattr(e, name) for name in FIELDS[needs]},
            replies={name: e.replies[name] for name in asked},
        )
        for e in evidence
    ]


@pytest.mark.parametrize(("name", "options"), GATES)
def test_a_gate_sends_what_the_draft_gets_wrong_and_looks_at_no_more_than_it_asks_for(name: str, options: dict) -> None:
    gate = hub.load("gate", name, **options)
    if gate.trained:
        gate.fit(made(seed=1))
    evidence = made(seed=2)
    rated = gate.rate(only(evidence, gate.needs, [q.name for q in gate.questions]))
    wrong = np.array([1 - e.outcome.draft for e in evidence])
    assert rated.score.shape == (400,)
    assert auroc(rated.score, wrong) > 0.7
    if rated.draft is not None:
        assert ((rated.draft >= 0) & (rated.draft <= 1)).all()
    one = gate.rate(only(evidence[7:8], gate.needs, [q.name for q in gate.questions]))
    np.testing.assert_allclose(one.score, rated.score[7:8], atol=1e-9)  # a query alone is rated as in its batch


def test_the_folder_holds_no_gate_that_is_not_tried_here() -> None:
    tried = {name for name, _ in GATES} | {"random", "always", "prp"}
    assert tried == set(hub.names("gate")) | {"prp"}


def test_random_is_a_function_of_the_id_and_the_seed() -> None:
    evidence = made(50)
    first = hub.load("gate", "random").rate(evidence).score
    np.testing.assert_array_equal(first[::-1], hub.load("gate", "random").rate(evidence[::-1]).score)
    assert (first != hub.load("gate", "random", seed=1).rate(evidence).score).all()
    assert ((first >= 0) & (first < 1)).all()


def test_always_is_one_model() -> None:
    assert (hub.load("gate", "always").rate(made(3)).score == np.inf).all()
    assert (hub.load("gate", "always", route="draft").rate(made(3)).score == -np.inf).all()


@pytest.mark.parametrize(("name", "said"), [
    ("logprob", "no lp_mean"), ("early", "no lp_early_8"), ("self_consistency", "two samples"), ("p_true", "no reply"),
    ("verbalised", "no reply"), ("automix", "no reply"), ("oracle", "needs outcomes"),
])  # fmt: skip
def test_missing_evidence_is_named(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        hub.load("gate", name).rate([Evidence(Query("q"))])


def test_fitting_needs_outcomes_and_states() -> None:
    bare = [dataclasses.replace(e, outcome=None) for e in made(4)]
    with pytest.raises(InputError, match="needs outcomes; 4 queries"):
        hub.load("gate", "difficulty").fit(bare)
    with pytest.raises(InputError, match="no hidden states"):
        hub.load("gate", "probe").fit([dataclasses.replace(e, session=None) for e in made(40)])


def test_logistic_regression_is_where_its_slope_is_zero() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), rng.random(60)
    model = Logistic(ridge=2.0).fit(x, y)

    def objective(weight: np.ndarray) -> float:
        z = weight[0] + x @ weight[1:]
        return float((np.logaddexp(0, z) - y * z).sum() + (weight[1:] ** 2).sum())

    slope = [
        (objective(model.weight + h) - objective(model.weight - h)) / 2e-5 for h in 1e-5 * np.eye(4)
    ]  # differences of an objective of size 40 carry errors of 1e-9
    np.testing.assert_allclose(slope, 0, atol=1e-4)


def test_the_factors_descend_along_the_slope_of_their_objective() -> None:
    rng = np.random.default_rng(0)
    gate = hub.load("gate", "mf", rank=2, ridge=3.0)
    x, success = rng.normal(size=(20, 4)), rng.random((20, 2))
    factors = {"v": rng.normal(size=(2, 2)), "w": rng.normal(size=(2, 4)), "b": rng.normal(size=2)}

    def objective(factors: dict[str, np.ndarray]) -> float:
        z = x @ factors["w"].T @ factors["v"].T + factors["b"]
        squares = (factors["v"] ** 2).sum() + (factors["w"] ** 2).sum()
        return float(((np.logaddexp(0, z) - success * z).sum() + 1.5 * squares) / 20)

    for name, slope in gate._slopes(factors, x, success).items():
        for at in np.ndindex(slope.shape):
            moved = [{**factors, name: factors[name].copy()} for _ in range(2)]
            moved[0][name][at] += 1e-5
            moved[1][name][at] -= 1e-5
            assert slope[at] == pytest.approx((objective(moved[0]) - objective(moved[1])) / 2e-5, abs=1e-6)


def test_a_scorer_of_answers_reads_the_answer_and_falls_back_on_what_was_read_out_of_it() -> None:
    gate = hub.load("gate", "frugal")
    gate.fit(made(seed=1))
    (one,) = made(1)
    said = [
        gate.rate([dataclasses.replace(one, answer=Continuation(text, label))]).score[0]
        for text, label in (("so it is red", "A"), ("maybe blue", "A"), ("", "maybe blue"))
    ]
    assert said[0] + 0.3 < said[1] == said[2]
    with pytest.raises(InputError, match="no answer of the draft"):
        gate.rate([dataclasses.replace(one, answer=None)])


def test_a_number_means_what_the_question_says_it_does() -> None:
    evidence = [Evidence(Query("q"), replies={"verbalised_post": 6.0})]
    assert hub.load("gate", "verbalised", certain=15).rate(evidence).draft == pytest.approx(0.4)
    asked = hub.load("gate", "verbalised", text="k:", when="pre").questions[0]
    assert (asked.name, asked.text, asked.after_answer) == ("verbalised_pre", "k:", False)


def test_features_of_a_query_do_not_depend_on_its_company() -> None:
    queries = [e.query for e in made(30)]
    features = Features(64)
    fitted = features.fit(queries)
    np.testing.assert_allclose(features(queries[3:5]), fitted[3:5])
    np.testing.assert_allclose(fitted.mean(0), 0, atol=1e-9)


def test_a_fit_holds_out_whole_groups() -> None:
    evidence = made(400)
    held = held_out(evidence)
    assert 0.1 < held.mean() < 0.3
    by_group = {}
    for each, out in zip(evidence, held, strict=True):
        assert by_group.setdefault(each.query.group, out) == out
