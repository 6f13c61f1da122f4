"""Every file of this folder is one method; `mmroute.gate.<Class>` loads the file that exports it."""

from typing import Any


def __getattr__(name: str) -> Any:
    from mmroute import hub

    return hub.by_class("gate", name)
