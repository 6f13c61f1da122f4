"""mmroute: vision-language models that reason with far less compute, by routing tokens, depth, thoughts and queries.

Importing this package imports no torch; each public name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmroute.backbones.load import load as load
    from mmroute.cache import RaggedCache as RaggedCache
    from mmroute.engine.attach import Routed as Routed
    from mmroute.engine.attach import attach as attach
    from mmroute.engine.attach import detach as detach
    from mmroute.engine.saving import from_pretrained as from_pretrained
    from mmroute.reason import Answer as Answer
    from mmroute.tokens import Modality as Modality
    from mmroute.tokens import Tokens as Tokens
    from mmroute.trace import Trace as Trace

_HOME = {
    "Answer": "mmroute.reason",
    "Modality": "mmroute.tokens",
    "RaggedCache": "mmroute.cache",
    "Routed": "mmroute.engine.attach",
    "Tokens": "mmroute.tokens",
    "Trace": "mmroute.trace",
    "attach": "mmroute.engine.attach",
    "detach": "mmroute.engine.attach",
    "from_pretrained": "mmroute.engine.saving",
    "load": "mmroute.backbones.load",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in ("cost", "deepen", "gate", "hub", "prune", "tasks", "think"):
        return importlib.import_module(f"mmroute.{name}")
    raise AttributeError(f"module 'mmroute' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
