"""Which positions go again: none. The stock depth.

Source: the unrouted model.
"""

from typing import Any

from mmroute.deepen.base import Deepener

__all__ = ["Nothing"]


class Nothing(Deepener):
    """No second pass."""

    def acts(self, layer: int, num_layers: int) -> bool:
        return False

    def again(self, *args: Any) -> None:
        return None
