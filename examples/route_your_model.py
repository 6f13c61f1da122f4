"""Route a stock Transformers model: attach, generate as ever, read what was saved, detach.

python examples/route_your_model.py FOLDER_OR_HUB_ID maze.png "Which exit is reached?"
"""

import sys
from typing import Any

import mmroute
from mmroute.backbones.images import prepare, user_message
from mmroute.cost import estimate_flops, estimate_kv_bytes, keep_shares


def main(model_name: str, image: Any, question: str) -> dict[str, float]:
    model = mmroute.load(model_name)  # a stock model; its processor stands on model.processor
    batch = prepare(model, model.processor, user_message(question, [image]))

    costs = {}
    for keep in (1.0, 0.4):
        pruner = mmroute.prune.Random(vision_keep=keep) if keep == 1 else mmroute.prune.FastV(vision_keep=keep)
        # strip_padding runs the routed layers even where everything is kept, so that both runs leave a trace.
        with mmroute.attach(model, prune=pruner, strip_padding=True) as routed:
            ids = model.generate(**batch, max_new_tokens=16, do_sample=False)
            trace = routed.trace
        costs[keep] = estimate_flops(trace).total, estimate_kv_bytes(trace), keep_shares(trace)["vision"]
        text = model.processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"vision_keep {keep}: {text!r}")

    flops, kv_bytes = (costs[0.4][i] / costs[1.0][i] for i in (0, 1))
    print(f"FLOPs {flops:.3f}, KV bytes {kv_bytes:.3f} of unrouted; {costs[0.4][2]:.0%} of vision positions ran")
    return {"flops": flops, "kv_bytes": kv_bytes, "vision": costs[0.4][2]}


if __name__ == "__main__":
    main(*sys.argv[1:4])
