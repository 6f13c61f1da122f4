"""Every file of this folder is one method; `mmroute.prune.<Class>` loads the file that exports it."""

from typing import Any


def __getattr__(name: str) -> Any:
    from mmroute import hub

    return hub.by_class("prune", name)
