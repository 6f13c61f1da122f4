"""Everything mmroute raises on purpose.

MmrouteError
├── ConfigError(ValueError)           an option, recipe or argument is wrong
├── InputError(ValueError)            an image, question or file cannot be used
├── UnsupportedBackbone(TypeError)    no family file knows this model
├── UnsupportedCall(ValueError)       a call that would run unrouted or unmasked: foreign cache, 4-D mask, backend
├── MissingExtra(ImportError)         an optional dependency is not installed
├── CheckpointMismatch(ValueError)    saved parts do not fit the model, or a folder is incomplete
└── BudgetError(ValueError)           a budget that no setting of the method reaches

A message says what was given, what is allowed and what to do.
"""

__all__ = [
    "BudgetError",
    "CheckpointMismatch",
    "ConfigError",
    "InputError",
    "MissingExtra",
    "MmrouteError",
    "UnsupportedBackbone",
    "UnsupportedCall",
]


class MmrouteError(Exception):
    """Base of all errors a user can cause; the CLI prints its message and exits with 1 or 2."""


class ConfigError(MmrouteError, ValueError):
    """An option, recipe or argument is wrong."""


class InputError(MmrouteError, ValueError):
    """An image, question or file cannot be used."""


class UnsupportedBackbone(MmrouteError, TypeError):
    """No file in `backbones/` knows this model."""


class UnsupportedCall(MmrouteError, ValueError):
    """A call that would silently run unrouted or unmasked."""


class MissingExtra(MmrouteError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, feature: str, package: str, extra: str, remedy: str = "") -> None:
        """Says what to install.

        Args:
            feature: what was asked for.
            package: what it needs.
            extra: mmroute's extra that brings the package; "" for one that none brings.
            remedy: what to do instead, where no extra brings it.
        """
        remedy = remedy or f'pip install "mmroute[{extra}]"'
        super().__init__(f"{feature} needs {package}, which is not installed; {remedy}")


class CheckpointMismatch(MmrouteError, ValueError):
    """Saved parts do not fit the model, or a folder lacks files."""


class BudgetError(MmrouteError, ValueError):
    """No setting of the method reaches the asked budget."""
