"""The flags of the command line are frozen: each one is API that cannot be taken back. Think, then run

    python tests/docs/test_flags.py

to write the list anew.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from mmroute.cli import app

FROZEN = Path(__file__).with_name("flags.txt")


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All commands with their words, groups included."""
    yield path, command
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from commands(inner, f"{path} {name}")


def flags() -> str:
    lines = []
    for path, command in commands(typer.main.get_command(app), "mmroute"):
        options = sorted("/".join(p.opts) for p in command.params if p.param_type_name == "option")
        arguments = [p.name.upper() for p in command.params if p.param_type_name == "argument"]
        lines.append(" ".join([path, *arguments, *options]))
    return "\n".join(lines) + "\n"


def test_no_flag_was_added_or_lost_without_saying_so() -> None:
    assert flags() == FROZEN.read_text(encoding="utf-8"), "run: python tests/docs/test_flags.py, and say why"


def test_every_command_and_every_option_has_a_help_text() -> None:
    for path, command in commands(typer.main.get_command(app), "mmroute"):
        assert command.help, f"{path} has no help"
        for option in command.params:
            if option.param_type_name == "option" and "--help" not in option.opts:
                assert option.help, f"{path} {option.opts[0]} has no help"


if __name__ == "__main__":
    FROZEN.write_text(flags(), encoding="utf-8")
