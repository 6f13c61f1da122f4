"""What the tests of compiled layers share."""

from typing import Any

GREEDY = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


class Graphs:
    """A backend that runs each graph as it was captured, and counts them: no compiler is needed to see what it gets."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward
