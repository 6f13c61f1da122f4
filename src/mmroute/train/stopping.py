"""When training ends by itself: after some looks that found nothing better."""

import copy
import math

from torch import nn

__all__ = ["Best"]


class Best:
    """Keeps the weights of the look with the smallest error.

    Example:
        >>> best = Best(nn.Linear(1, 1), patience=2)
        >>> [best.is_over(error) for error in (0.5, 0.4, 0.6, 0.45)]
        [False, False, False, True]
    """

    def __init__(self, module: nn.Module, patience: int) -> None:
        """
        Args:
            module: whose weights are kept.
            patience: looks without a smaller error after which training is over.
        """
        self.errors: list[float] = []
        self._module, self._patience = module, patience
        self._least, self._state = math.inf, copy.deepcopy(module.state_dict())

    def is_over(self, error: float) -> bool:
        """Takes note of a look; True where training should end."""
        self.errors.append(error)
        if error < self._least:
            self._least, self._state = error, copy.deepcopy(self._module.state_dict())
        return len(self.errors) - 1 - self.errors.index(min(self.errors)) >= self._patience

    def put_back(self) -> list[float]:
        """Gives the module the kept weights; returns all errors in their order."""
        self._module.load_state_dict(self._state)
        return self.errors
