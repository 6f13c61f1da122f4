"""A result file's content for tests."""

from mmroute.bench import schema

__all__ = ["SPREAD", "make_result"]

SPREAD = {"median": 0.5, "p10": 0.4, "p90": 0.6, "min": 0.4, "max": 0.6, "n": 9}


def make_result(**changes) -> schema.Result:
    parts = {
        "run": schema.Run(
            command="mmroute eval",
            commit="abc",
            dirty=False,
            started_at="2026-01-01T00:00:00Z",
            wall_s=1.5,
            mmroute="0",
        ),
        "machine": schema.Machine(
            device="cpu", cpu="x", threads=1, torch="2", transformers="5", dtype="float32", attention="sdpa"
        ),
        "model": schema.Model(id="tiny", family="qwen2_5_vl", layers=2),
        "method": schema.Method(
            recipe="random", prune="random", think="text", config={"prune": {"seed": 0}}, needs=[], checked=""
        ),
        "task": schema.Task(name="maze-v1", preset="small", split="test", n=4, seed=0, ids_sha256="00", scorer="exact"),
        "quality": schema.Quality(accuracy=0.75, wilson95=(0.3, 0.95), correct="1101", parsed=1.0),
        "cost": schema.Cost(
            flops_prefill=10.0,
            flops_decode=5.0,
            flops_extra=1.0,
            flops_lm_head=1.0,
            flops_answer=17.0,
            flops_tower=None,
            v_eff=40.0,
            t_eff=14.0,
            keep={"vision": 0.4, "text": 0.7},
            kv_bytes_prefill=100.0,
            kv_bytes_peak=130.0,
            kv_bytes_end=130.0,
            ar_steps=8.0,
        ),
        "time": schema.Time(
            prefill_s=SPREAD,
            decode_s_per_token=SPREAD,
            tower_s=SPREAD,
            forced_tokens=64,
            batch=1,
            items=4,
            clock="thread",
            ratio={"prefill": SPREAD, "decode": SPREAD},
            realised_saving=0.9,
        ),
        "baseline": schema.Baseline(
            recipe="none",
            diff=-0.25,
            ci95=(-0.6, 0.0),
            only_ours=0,
            only_theirs=1,
            mcnemar_p=1.0,
            not_worse_at_1_point=False,
        ),
    }
    return schema.Result(**{**parts, **changes})
