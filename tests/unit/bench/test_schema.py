"""Result files are written whole and read strictly."""

import json

import pytest
from result_samples import make_result

from mmroute.bench import engine_schema, schema
from mmroute.config import resolved
from mmroute.errors import ConfigError, InputError


def make_summary(**changes) -> schema.Summary:
    plain = {
        "task": "maze",
        "recipe": "none",
        "model": "tiny",
        "n": 4,
        "accuracy": 1.0,
        "ci95": (0.5, 1.0),
        "flops": 20.0,
        "kv_bytes": 200.0,
        "ar_steps": 8.0,
        "prefill_s": 0.1,
        "decode_s_per_token": 0.01,
        "keep": {"vision": 1.0, "text": 1.0},
        "seed": 0,
        "commit": "abc",
    }
    return schema.Summary(**{**plain, **changes})


def test_a_result_survives_its_file(tmp_path):
    path = tmp_path / "deep" / "r.json"
    schema.write_result(path, make_result())
    assert schema.read_result(path) == make_result()
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_a_result_without_timing_and_baseline_survives_too(tmp_path):
    schema.write_result(tmp_path / "r.json", make_result(time=None, baseline=None))
    assert schema.read_result(tmp_path / "r.json").time is None


@pytest.mark.parametrize("section", ["", "cost", "quality", "time"])
def test_an_unknown_field_fails(tmp_path, section):
    data = resolved(make_result())
    (data[section] if section else data)["speed"] = 3
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="speed"):
        schema.read_result(tmp_path / "r.json")


def test_a_missing_field_fails(tmp_path):
    data = resolved(make_result())
    del data["cost"]["kv_bytes_peak"]
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="kv_bytes_peak"):
        schema.read_result(tmp_path / "r.json")


def test_another_schema_and_broken_files_are_refused(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**resolved(make_result()), "schema": "result/9"}))
    with pytest.raises(InputError, match="result/9"):
        schema.read_result(path)
    path.write_text('{"schema": "resu')
    with pytest.raises(InputError, match="not a result file"):
        schema.read_result(path)
    with pytest.raises(InputError, match="absent"):
        engine_schema.read_engine(tmp_path / "absent.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "r.json"
    schema.write_json(path, {"good": 1})
    with pytest.raises(ValueError, match="JSON"):
        schema.write_json(path, {"bad": float("nan")})
    assert json.loads(path.read_text()) == {"good": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_killed_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    schema.write_json(path, {"good": 1})
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        schema.write_json(path, {"good": 2})
    assert json.loads(path.read_text()) == {"good": 1}


def test_the_eval_line_has_the_promised_keys_in_order():
    alone = make_summary().to_dict()
    promised = "task, recipe, model, n, accuracy, ci95, flops, kv_bytes, ar_steps, prefill_s, decode_s_per_token"
    assert ", ".join(alone) == promised + ", keep, seed, commit"
    ratio = schema.Ratios(flops=0.5, kv_bytes=0.5, prefill=0.6, decode=1.0)
    both = make_summary(recipe="random", baseline=make_summary(), ratio=ratio).to_dict()
    assert both["baseline"] == alone
    assert both["ratio"] == {"flops": 0.5, "kv_bytes": 0.5, "prefill": 0.6, "decode": 1.0}


def test_the_machine_says_no_host_name():
    import socket

    machine = resolved(schema.machine_here("cpu", "float32", "sdpa"))
    assert socket.gethostname() not in machine.values()
    assert machine["threads"] == 1
