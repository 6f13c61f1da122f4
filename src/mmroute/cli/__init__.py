"""The command line: one root, a verb per file, each a few lines over a library call.

Results go to stdout, progress and logs to stderr. Exit 0 done, 1 failed, 2 usage, 130 interrupted.
Nothing here imports torch before a verb runs: `--help` must not pay for it.
"""

import errno
import logging
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Annotated

import typer

from mmroute.cli import ask, bench, calibrate, data, demo, diagnose, evaluate, info, inspect, serve, train
from mmroute.errors import ConfigError, MmrouteError

__all__ = ["app", "main"]

app = typer.Typer(
    name="mmroute",
    help="Vision-language models that reason with far less compute, by routing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(version("mmroute"))
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Vision-language models that reason with far less compute, by routing."""


app.command("ask")(ask.ask)
app.command("eval")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)
app.command("inspect")(inspect.inspect)
app.add_typer(data.app, name="data")
app.add_typer(train.app, name="train")
app.add_typer(calibrate.app, name="calibrate")
app.add_typer(diagnose.app, name="diagnose")
app.command("serve")(serve.serve)
app.command("replay")(serve.replay)
app.command("list")(info.list_methods)
app.command("env")(info.env)
app.command("check")(info.check)


def main() -> None:
    """Entry point: runs the verb, and turns what a user can cause into one line on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mmroute").setLevel(logging.INFO)
    try:
        app()
    except ConfigError as error:
        _fail(error, 2)
    except MmrouteError as error:
        _fail(error, 1)
    except Exception as error:
        if _is_disk_full(error):
            name = next((e.filename for e in _chain(error) if isinstance(e, OSError) and e.filename), None)
            where = f" at {name}" if name else ""
            _fail(f"the disk is full{where}; files already there are whole; make room and run again", 1)
        if isinstance(error, OSError):
            _fail(error, 1)
        raise


def _fail(reason: object, code: int) -> None:
    """One line, whatever the message has in it; the traceback is for programmers."""
    print(f"mmroute: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(code)


def _is_disk_full(error: BaseException) -> bool:
    # safetensors and torch wrap the operating system's error in their own, with its text inside.
    return any(
        getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(e)
        for e in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
