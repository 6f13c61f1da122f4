"""Results of gates and of the gateway are read as strictly as others, and their tables say what they hold."""

import dataclasses
import json

import pytest
from result_samples import make_result

from mmroute.bench import gate_schema, schema, table
from mmroute.config import resolved
from mmroute.errors import ConfigError, InputError

LOAD = {
    "n": 100,
    "concurrency": 8,
    "lost": 0,
    "doubled": 0,
    "leaked": 0,
    "unshaped": 0,
    "left_running": 0,
    "outcomes": {"whole": 90, "gone": 10},
}
TIMES = {
    "rounds": 5,
    "unit": "ms",
    "whole JSON answer": {
        "direct": {"p50": 1.0, "p99": 2.0},
        "forced": {"p50": 2.5, "p99": 6.0},
        "direct draft": {"p50": 1.0, "p99": 2.0},
        "peek kept": {"p50": 3.0, "p99": 7.0},
        "added forced": {"p50": 1.5, "p99": 4.0},
        "added peek": {"p50": 2.0, "p99": 5.0},
    },
}


def make_run(**changes) -> gate_schema.GatewayResult:
    parts = {
        "run": make_result().run,
        "cpus": 2,
        "busy": 0.1,
        "python": "3.11",
        "settings": {},
        "load": LOAD,
        "resident_mib": {"before": 80.0, "after": 81.5},
        "latency": None,
        "throughput": None,
    }
    return gate_schema.GatewayResult(**{**parts, **changes})


def make_eval() -> gate_schema.GateEval:
    summary = gate_schema.GateSummary(
        recipe="prp-small", n=100, seed=2, budget=0.4, accuracy=0.8, ci95=(0.7, 0.9), accuracy_draft=0.6,
        accuracy_target=0.7, accuracy_random=0.64, accuracy_oracle=0.85, target_share=0.41, oracle_normalised_gain=None,
        cost_ratio=0.5, cost_ratio_draft=0.1, time_ratio=0.6, rating_overhead=1.2, rating_steps=1,
        rating_flops_share=0.01, by_part={}, artifact="", commit="abc",
    )  # fmt: skip
    return gate_schema.GateEval(run=make_result().run, machine=make_result().machine, summary=summary)


def test_results_survive_their_files_and_an_unknown_field_fails(tmp_path):
    schema.write_result(tmp_path / "load.json", make_run())
    schema.write_result(tmp_path / "eval.json", make_eval())
    assert gate_schema.read_gateway(tmp_path / "load.json") == make_run()
    assert gate_schema.read_gate_eval(tmp_path / "eval.json") == make_eval()
    with pytest.raises(InputError, match="gateway/1"):
        gate_schema.read_gateway(tmp_path / "eval.json")
    (tmp_path / "load.json").write_text(json.dumps({**resolved(make_run()), "speed": 3}))
    with pytest.raises(ConfigError, match="speed"):
        gate_schema.read_gateway(tmp_path / "load.json")


@pytest.mark.parametrize("name", gate_schema.MUST_BE_0)
def test_one_lost_answer_is_not_sound(name):
    assert make_run().sound
    assert not make_run(load={**LOAD, name: 1}).sound


def test_tables_say_what_was_run_and_no_more(tmp_path):
    schema.write_result(tmp_path / "gateway/load.json", make_run())
    text = table.table_of(tmp_path / "gateway")
    assert "| 100 | 8 | 0 | 0 | 0 | 0 | 0 | +1.5 MiB |" in text
    assert "How they ended: gone 10, whole 90." in text
    assert "added p50" not in text
    schema.write_result(tmp_path / "gateway/times.json", make_run(load=None, resident_mib={}, latency=TIMES))
    text = table.table_of(tmp_path / "gateway")
    assert "| whole JSON answer | gateway, passed on | 1.00 | 2.50 | 1.50 | 4.00 |" in text
    assert "nginx" not in text
    beside = {"nginx": {"p50": 1.25, "p99": 2.0}, "added nginx": {"p50": 0.25, "p99": 0.5}}
    proxied = {k: v | beside if isinstance(v, dict) else v for k, v in TIMES.items()}
    schema.write_result(tmp_path / "gateway/times.json", make_run(load=None, resident_mib={}, latency=proxied))
    assert "| whole JSON answer | nginx | 1.00 | 1.25 | 0.25 | 0.50 |" in table.table_of(tmp_path / "gateway")
    schema.write_result(tmp_path / "evals/a.json", make_eval())
    assert "| prp-small | 2 | 100 | 0.40 | 0.410 | 0.800 [0.700, 0.900] |" in table.table_of(tmp_path / "evals")
    dirty = dataclasses.replace(make_run(), run=dataclasses.replace(make_run().run, dirty=True))
    schema.write_result(tmp_path / "gateway/load.json", dirty)
    with pytest.raises(InputError, match="not committed"):
        table.table_of(tmp_path / "gateway")
