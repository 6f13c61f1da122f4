"""How lmms-eval finds mmroute: the entry point `lmms_eval.models`, and the folder of the tasks it lacks.

lmms-eval is never a dependency (about 115 packages); it is installed in an environment of its own, with mmroute in it:

    lmms-eval --model mmroute --model_args pretrained=tiny,recipe=schedule \\
        --include_path "$(mmroute data lmms-path)" --tasks mmroute_vsr

Footgun: an exception in an entry point is only warned about by lmms-eval, which then says that it knows no such model.
So this module imports nothing heavy, and its registration is tested.
"""

from pathlib import Path
from typing import Any

__all__ = ["TASKS", "manifests"]

TASKS = Path(__file__).parent / "lmms_tasks"
"""Folder of the YAML files, for `--include_path`."""


def manifests() -> list[Any]:
    """What lmms-eval's registry asks for; floor 0.6.1."""
    from lmms_eval.models.registry_v2 import ModelManifest

    chat = ModelManifest(
        model_id="mmroute", chat_class_path="mmroute.bench.lmms_eval.Routed", aliases=("mmroute_chat",)
    )
    return [chat]
