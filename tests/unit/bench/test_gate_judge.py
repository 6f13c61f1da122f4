"""Judging gates: each pays for what it looked at, the oracle stays on top, and skipped gates say why."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mmroute import hub
from mmroute.bench import gate_report
from mmroute.bench.gate import is_gate_bench, read
from mmroute.bench.gate_judge import Case, Scored, evidence_of, judge, judge_table, score_gates
from mmroute.bench.outcomes.base import Outcomes, Row, pair_up
from mmroute.cli import app
from mmroute.errors import ConfigError, InputError


def outcomes(n: int = 400, seed: int = 0) -> Outcomes:
    """Half of the questions name a maze, which the draft cannot do; the log-probability knows a little of it."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        maze = i % 2 == 0
        right = float(rng.random() < (0.1 if maze else 0.9))
        shared = {
            "query_id": f"q{i}",
            "group": f"g{i // 4}",
            "task": "maze" if maze else "lake",
            "text": "maze" if maze else "lake",
        }
        stats = {"lp_mean": -1 + right + rng.normal(0, 0.7), "lp_q90": -1.0 + right}
        rows.append(Row(**shared, role="draft", model="d", correct=right, flops=2.0, prefill_flops=1.0, stats=stats))
        rows.append(Row(**shared, role="target", model="t", correct=0.9, flops=10.0))
    return pair_up(rows)


CASES = [
    Case(name="random"),
    Case(name="difficulty"),
    Case(name="logprob"),
    Case(name="p_true"),
    Case(name="probe"),
    Case(name="oracle"),
]


def test_gates_are_fitted_on_other_queries_and_skipped_where_evidence_is_missing() -> None:
    train, test = outcomes(seed=1), outcomes(seed=2)
    scored = {each.title: each for each in score_gates(CASES, evidence_of(train), evidence_of(test))}
    assert "no reply to 'p_true'" in scored["p_true"].skipped
    assert "no hidden states" in scored["probe"].skipped
    judged = {name: judge(each, test, resamples=0) for name, each in scored.items()}
    gain = {name: each.figures.get("ong") for name, each in judged.items()}
    assert judged["p_true"].figures == {}
    assert gain["oracle"] == pytest.approx(1)
    assert gain["oracle"] > gain["difficulty"] > gain["logprob"] > gain["random"] + 0.1
    assert judged["difficulty"].ratings["draft"]["auroc"] > 0.85


def test_who_reads_the_answer_pays_for_it_on_every_query() -> None:
    made = outcomes()
    score = made.pair.advantage
    at = {
        needs: judge(Scored("x", needs, score), made, resamples=0).curve["cost"]
        for needs in ("nothing", "prefill", "answer")
    }
    # a draft's answer costs 2, its prefill 1, the target's answer 10
    assert [at["nothing"][0], at["nothing"][-1]] == [2, 10]
    assert [at["prefill"][0], at["prefill"][-1]] == [2, 11]
    assert [at["answer"][0], at["answer"][-1]] == [2, 12]
    assert judge(Scored("x", "samples", score, samples=4), made, resamples=0).curve["cost"][0] == 5
    # of 32 tokens that cost 1 together, 8 or 16 were written before the target was asked; of 4 at most these
    early = [judge(Scored("x", "early", score, steps=m), made, resamples=0).curve["cost"][-1] for m in (8, 16)]
    assert early == pytest.approx([11.25, 11.5])
    made.stats["tokens"] = np.full(400, 4.0)
    assert judge(Scored("x", "early", score, steps=16), made, resamples=0).curve["cost"][-1] == 12
    assert judge(Scored("x", "nothing", score), made, resamples=0).figures["cost_ratio_at_40"] == pytest.approx(0.52)


def test_a_second_look_sends_what_it_has_read_and_pays_for_both_answers_there_alone() -> None:
    made = outcomes()
    rng = np.random.default_rng(0)
    first, second = rng.random(400), 1 - made.draft + 0.1 * rng.random(400)
    looks = Scored("x", "prefill", first, second=second, verify_share=0.25)
    found = judge(looks, made, resamples=0)
    ahead = np.argsort(-first, kind="stable")[:120]
    late = [i for i in np.argsort(-second, kind="stable") if i not in set(ahead.tolist())][:40]
    sent = np.zeros(400, dtype=bool)
    sent[ahead] = sent[late] = True
    right = np.where(sent, made.target, made.draft)
    assert found.at["0.4"] == pytest.approx(right.mean())
    # an answer of the draft costs 2, its prefill 1, the target's answer 10
    share, cost = found.curve["share"], found.curve["cost"]
    assert cost[share.index(0.4)] == pytest.approx((120 * 11 + 40 * 12 + 240 * 2) / 400)
    assert (cost[0], cost[-1]) == (2, pytest.approx((300 * 11 + 100 * 12) / 400))
    assert found.at["0.4"] > judge(Scored("x", "prefill", first), made, resamples=0).at["0.4"]
    assert found.realised["0.4"] == pytest.approx(0.4, abs=0.03)
    half = made.take(np.arange(400) < 200)
    part = judge(looks.take(np.arange(400) < 200), half, resamples=0)
    alone = Scored("x", "prefill", first[:200], second=second[:200], verify_share=0.25)
    assert part.at == judge(alone, half, resamples=0).at


def test_the_unrated_go_to_the_target_first() -> None:
    made = outcomes()
    score = made.pair.advantage.copy()
    score[:40] = np.nan
    found = judge(Scored("x", "prefill", score), made, resamples=0)
    assert found.at["0.2"] < judge(Scored("x", "prefill", made.pair.advantage), made, resamples=0).at["0.2"]
    assert found.realised["0.4"] == pytest.approx(0.4, abs=0.03)


def test_a_rival_is_compared_on_the_same_drawn_groups() -> None:
    made = outcomes()
    found = judge(Scored("random", "nothing", np.zeros(400)), made, made.pair.advantage, resamples=100)
    low, high = found.intervals["rival_area_lead"]
    assert 0 < low < high
    assert found.intervals["ong"] == pytest.approx((0, 0), abs=1e-12)
    low, high = found.intervals["rival_lead_at_0.4"]
    assert 0 < low < high
    assert found.realised == {b: pytest.approx(float(b), abs=0.03) for b in found.at}
    assert found.figures["realised_off"] == max(abs(float(b) - share) for b, share in found.realised.items())


def test_a_table_is_judged_by_what_it_holds(tmp_path: Path) -> None:
    made = outcomes()
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["id", "text", "group", "draft_correct", "target_correct", "draft_cost", "target_cost", "score_mine"]
        )
        for i in range(len(made)):
            writer.writerow(
                [i, made.texts[i], made.groups[i], made.draft[i], made.target[i], 2, 10, made.pair.advantage[i]]
            )
    done = CliRunner().invoke(app, ["eval", "--outcomes", str(path), "--json", "--out", str(tmp_path / "o.json")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    gates = found["gates"]
    assert gates["mine"]["figures"]["ong"] == pytest.approx(1)
    assert gates["oracle advantage"]["figures"]["ong"] >= gates["oracle difficulty"]["figures"]["ong"]
    assert gates["difficulty"]["figures"]["ong"] > 0.5
    assert json.loads((tmp_path / "o.json").read_text()) == found


def test_a_table_of_one_group_cannot_be_judged() -> None:
    made = outcomes(8)
    same = Outcomes(**{**made.__dict__, "groups": ["g"] * 8})
    with pytest.raises(InputError, match="of one group"):
        judge_table(same)


def test_the_report_sorts_by_gain_and_names_what_was_skipped() -> None:
    scored = score_gates(CASES, evidence_of(outcomes(seed=1)), evidence_of(outcomes()))
    judged = {each.title: judge(each, outcomes(), resamples=10) for each in scored}
    text = gate_report.lines(judged)
    assert text[2].startswith("| oracle | outcome | 1.000 [1.000, 1.000] |")
    assert any(line.strip().startswith("Skipped: p_true") for line in text)


def test_scores_are_taken_and_joined_query_by_query() -> None:
    made = outcomes()
    (scored,) = score_gates([Case(name="difficulty")], evidence_of(outcomes(seed=1)), evidence_of(made))
    here = np.arange(400) < 100
    part, rest = made.take(here), made.take(~here)
    joined = Outcomes.joined([part, rest])
    assert joined.ids == made.ids
    np.testing.assert_array_equal(joined.draft_cost, made.draft_cost)
    np.testing.assert_array_equal(joined.stats["lp_mean"], made.stats["lp_mean"])
    alone = judge(scored.take(here), part, resamples=0)
    assert alone.figures["ong"] != judge(scored, made, resamples=0).figures["ong"]
    (again,) = score_gates([Case(name="difficulty")], evidence_of(outcomes(seed=1)), evidence_of(part))
    assert alone.figures == judge(again, part, resamples=0).figures
    bare = Outcomes.joined([part, Outcomes(**{**rest.__dict__, "stats": {}})])
    assert bare.stats == {}  # what one table lacks, their sum has not


def test_the_shipped_bench_names_gates_that_exist() -> None:
    made = read("bench-gate", ["set={}", "gate.draft=some/folder", "gate.policy.budget=0.3"], n=50)
    assert (made.n, made.train) == (50, 260)
    assert made.set == {"gate.draft": "some/folder", "gate.policy.budget": 0.3}
    assert read("bench-gate", ["train=7"], n=50).train == 7
    for case in made.gates:
        hub.load("gate", case.name, **case.options)
    with pytest.raises(ConfigError, match="no bench recipe"):
        read("bench-gates")
    assert is_gate_bench("bench-gate")
    assert not is_gate_bench("bench-spatial")
