"""How lmms-eval shows and scores our items: the functions that the YAML files here name."""

from mmroute.tasks._export import lmms_process, lmms_text, lmms_visual

__all__ = ["lmms_process", "lmms_text", "lmms_visual"]
