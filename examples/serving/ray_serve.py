"""The gateway as a Ray Serve deployment: replicas, restarts and rollouts are Ray's, routing stays ours.

pip install "mmroute[serve]" "ray[serve]"
python examples/serving/ray_serve.py http://127.0.0.1:8001/v1#draft-model http://127.0.0.1:8002/v1#target-model
"""

import sys

from mmroute.serve.gateway import build_app
from mmroute.serve.settings import read, upstream


def application(draft: str, target: str, budget: float = 0.4, replicas: int = 1):
    """The ASGI application; each replica builds its own, as the policy's window and the metrics live in it.

    Caps on the target (`target_in_flight`) are for all replicas together: `replicas` divides them.
    """
    given = {"draft": upstream(draft), "target": upstream(target), "replicas": replicas}
    return build_app(read(None, {**given, "policy": {"name": "budget", "budget": budget}}))


def main(draft: str, target: str, replicas: int = 2) -> None:
    from ray import serve

    @serve.deployment(num_replicas=replicas, max_ongoing_requests=512, graceful_shutdown_timeout_s=300)
    @serve.ingress(lambda: application(draft, target, replicas=replicas))
    class Gateway:
        pass

    serve.run(Gateway.bind(), blocking=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
