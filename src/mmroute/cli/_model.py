"""Where a model runs and how exactly, for every verb that opens one."""

from typing import Annotated, Any

import typer

__all__ = ["Device", "Dtype", "open_model"]

Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if not given.")]


def open_model(model: str, device: str, dtype: str | None = None) -> Any:
    """The model of a bundled name, folder or Hub id on what `--device` and `--dtype` say.

    Raises:
        ConfigError: no such device or dtype, or no such device here.
        MmrouteError: as `backbones.load.load`.
    """
    from mmroute.processes import device_named

    where = device_named(device)  # what is not there is said before seconds of imports and loading
    from mmroute.backbones.load import load

    # The CPU is where a model is read to: quantised ones refuse to be moved, even to where they are.
    return load(model, dtype=dtype or None, device=None if where.type == "cpu" else where)
