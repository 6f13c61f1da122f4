"""The small parts: events in any pieces, the circuit, the retry budget, settings and keys, the replay log."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmroute.errors import ConfigError, InputError
from mmroute.gate._policy import policy
from mmroute.serve.breaker import Breaker, RetryBudget
from mmroute.serve.replay import ReplayLog, read_log, replay
from mmroute.serve.settings import Circuit, Keys, read, upstream
from mmroute.serve.spending import Spending
from mmroute.serve.sse import Decoder, TooLong, encode

# ---- events


@given(st.lists(st.binary(max_size=12).filter(lambda b: b"\n" not in b and b"\r" not in b), max_size=5), st.data())
def test_events_are_the_same_in_whatever_pieces_they_come(payloads, data):
    stream = b": comment\r\n\r\n" + b"".join(
        encode(p).replace(b"\n", data.draw(st.sampled_from([b"\n", b"\r\n"]))) for p in payloads
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    decoder, out = Decoder(), []
    for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        out += decoder.feed(stream[a:b])
    assert out == payloads


def test_data_lines_of_one_event_are_joined_and_other_fields_ignored():
    assert Decoder().feed(b"event: x\nid: 3\ndata: a\ndata:b\n\ndata: c\n\n") == [b"a\nb", b"c"]


def test_an_event_beyond_the_limit_is_refused():
    with pytest.raises(TooLong):
        Decoder(limit=100).feed(b"data: " + b"x" * 200)


# ---- the circuit


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_circuit_opens_waits_longer_each_time_and_closes_after_two_good_probes():
    clock = Clock()
    breaker = Breaker(Circuit(failures=3, open_s=10, open_cap_s=15), clock)
    for _ in range(3):
        assert breaker.enter()
        breaker.bad()
    assert (breaker.state, breaker.available, breaker.wait) == ("open", False, 10)
    clock.now = 10
    assert breaker.enter()
    assert not breaker.enter()  # one probe at a time
    breaker.bad()
    assert breaker.wait == 15  # doubled, capped
    clock.now = 25
    assert breaker.enter()
    breaker.leave()  # a probe that was cancelled says nothing and blocks nothing
    for _ in range(2):
        assert breaker.enter()
        breaker.good()
    assert breaker.state == "closed"


def test_half_of_enough_calls_opens_it_too_and_a_good_one_ends_a_row():
    clock = Clock()
    breaker = Breaker(Circuit(failures=5), clock)
    for _ in range(9):
        breaker.bad()
        breaker.good()
    assert breaker.state == "closed"
    breaker.bad()
    breaker.bad()
    assert breaker.state == "open"


def test_a_held_server_is_not_asked_and_not_failing():
    clock = Clock()
    breaker = Breaker(Circuit(), clock)
    breaker.hold(5)
    assert not breaker.enter()
    clock.now = 5
    assert breaker.enter()
    assert breaker.state == "closed"


def test_retries_are_a_share_of_requests():
    clock = Clock()
    budget = RetryBudget(0.1, clock)
    for _ in range(100):
        budget.request()
    assert [budget.take() for _ in range(11)] == [True] * 10 + [False]
    clock.now = 11
    assert [budget.take() for _ in range(4)] == [True] * 3 + [False]


def test_an_hours_spending_slides_and_forgets():
    clock = Clock()
    spent = Spending(clock)
    for minute in range(120):
        clock.now = 60.0 * minute
        spent.add(1.0)
        spent.add(0.5)
        assert spent.last_hour == 1.5 * min(minute + 1, 61)
    clock.now += 59.9
    assert spent.last_hour == 1.5 * 61
    clock.now = 60.0 * 119 + 3600
    assert spent.last_hour == 1.5
    clock.now += 60
    assert spent.last_hour == 0


# ---- settings


def test_later_sources_win(tmp_path, monkeypatch):
    file = tmp_path / "serve.yaml"
    file.write_text("port: 9001\ndrain_s: 7\nlimits: {images: 3}\n")
    monkeypatch.setenv("MMROUTE_DRAIN_S", "8")
    monkeypatch.setenv("MMROUTE_LIMITS__MESSAGES", "9")
    settings = read(file, {"port": 9002})
    assert (settings.port, settings.drain_s) == (9002, 8)
    assert (settings.limits.images, settings.limits.messages) == (3, 9)
    assert read().host == "127.0.0.1"


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"prot": 1}, "serve.prot"),
        ({"limits": {"images": -1}}, "serve.limits.images"),
        ({"host": "0.0.0.0"}, "nobody is asked for a key"),
        ({"draft": {"model": "x", "url": "ftp://x"}}, "http"),
        ({"draft": {"model": "x", "url": "http://x", "recipe": "schedule"}}, "recipe"),
        ({"mode": "stream_peek"}, "asks a server"),
        ({"mode": "inprocess", "draft": {"model": "x", "url": "http://x"}}, "local draft"),
        ({"draft": {"model": "tiny"}}, "both served as 'tiny'"),
        ({"replicas": 0}, "serve.replicas"),
        ({"target_usd_per_hour": 2.0}, "price_in and price_out"),
        ({"replicas": 3, "target_in_flight": 2}, "at least one for each"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(given_, words):
    with pytest.raises(ConfigError, match=words):
        read(None, given_)


@pytest.mark.parametrize("cap", [3, 4, 7, 64])
def test_the_parts_of_a_cap_are_never_more_than_the_cap_nor_nothing(cap):
    part = read(None, {"replicas": 3, "target_in_flight": cap}).own_target_in_flight
    assert part >= 1
    assert 3 * part <= cap < 3 * (part + 1)
    assert read(None, {"replicas": 3}).own_target_in_flight is None


def test_an_upstream_is_an_address_with_a_name_or_a_local_model(tmp_path):
    assert upstream("http://a:1/v1#m/x") == {"url": "http://a:1/v1", "model": "m/x"}
    assert upstream("tiny") == {"model": "tiny"}
    with pytest.raises(ConfigError, match="after a #"):
        upstream("http://a:1/v1")
    with pytest.raises(ConfigError, match="no settings file"):
        read(tmp_path / "none.yaml")


def test_keys_are_known_by_their_hash_alone(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# who\n\nann:{hashlib.sha256(b'k1').hexdigest()}\nbob:{hashlib.sha256(b'k2').hexdigest()}\n")
    keys = Keys(file)
    assert [keys.owner(f"Bearer {k}") for k in ("k1", "k2", "k3", "")] == ["ann", "bob", None, None]
    assert keys.owner("Basic k1") is None
    assert Keys(None).owner("") == "anyone"
    for text, words in (("ann:secret\n", "line 1"), ("\n", "no key")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            Keys(file)
    with pytest.raises(ConfigError, match="api_keys_file"):
        Keys(tmp_path / "missing")


# ---- the replay log


def record(i, score, route, reason="rating"):
    return {
        "schema": "replay/1", "request_id": f"r{i}", "outcome": "ok", "route": route, "reason": reason, "score": score,
        "draft_rating": None, "target_rating": None, "shadow": None, "total_ms": {"draft": 10, "target": 30}[route],
    }  # fmt: skip


def test_a_log_is_rotated_and_read_back_without_its_torn_line(tmp_path):
    path = tmp_path / "logs" / "replay.jsonl"
    log = ReplayLog(path, most_bytes=2000, files=2)
    for i in range(40):
        log.write(record(i, 0.1, "draft"))
    log.close()
    files = sorted(p.name for p in path.parent.iterdir())
    assert files == ["replay.jsonl", "replay.jsonl.1", "replay.jsonl.2"]
    assert all(p.stat().st_size <= 2000 for p in path.parent.iterdir())
    last = [r["request_id"] for r in read_log(path)]
    assert last[-1] == "r39"
    with path.open("ab") as file:
        file.write(b'{"schema": "rep')  # a machine that died
    again = ReplayLog(path, most_bytes=10_000, files=2)
    again.write(record(40, 0.1, "draft"))
    again.close()
    assert [r["request_id"] for r in read_log(path)] == [*last, "r40"]


def test_what_is_no_log_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    with pytest.raises(InputError, match="replay_log"):
        list(read_log(path))
    path.write_text('{"schema": "result/1"}\n')
    with pytest.raises(InputError, match="line 1"):
        list(read_log(path))


def test_a_full_disk_drops_lines_and_counts_them(tmp_path, monkeypatch):
    log = ReplayLog(tmp_path / "x", most_bytes=10_000, files=1)
    monkeypatch.setattr("os.write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    log.write(record(0, 0.1, "draft"))
    assert log.dropped == 1


def test_another_policy_is_run_over_the_same_ratings():
    records = [record(i, i / 10, "target" if i > 4 else "draft") for i in range(10)]
    records += [record(10, None, "target", "forced"), record(11, 0.9, "target", "fallback")]
    found = replay(iter(json.loads(json.dumps(records))), policy("threshold", threshold=0.75))
    assert (found["requests"], found["rated"], found["changed"]) == (12, 10, 3)
    assert (found["target_share_then"], found["target_share_now"]) == (0.5, 0.2)
    assert found["mean_ms_now"] == pytest.approx(0.8 * 10 + 0.2 * 30)
