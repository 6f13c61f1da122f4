"""Every command that a page shows exists, with every flag it is shown with; so do modules, make targets and files."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from mmroute.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md")]
PAGES += [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "log.md"]  # a log tells of its day
CODE = re.compile(r"^```\w*\n(.*?)^```|`([^`\n]+)`", re.DOTALL | re.MULTILINE)
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def shown(page):
    """Lines of code, in blocks and in running text."""
    for block, span in CODE.findall(page.read_text(encoding="utf-8")):
        for line in (block or span).replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in line.split("&&"))


def words_of(line):
    """A command in words, without its comment and without what it redirects."""
    return shlex.split(line.replace("<", " ").replace(">", " "), comments=True)


def unknown(words):
    """What of a `mmroute` command line the program does not know; None where all is well."""
    command, rest = typer.main.get_command(app), words[1:]
    while getattr(command, "commands", None) and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            known = all(word in command.commands for word in rest[0].split("|"))  # `train a|b`
            return None if known else rest[0]
        command, rest = command.commands[rest[0]], rest[1:]
    flags = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)} | {"--help"}
    return next((word for word in rest if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in flags), None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_shows_only_commands_that_exist(page):
    for line in shown(page):
        if line.startswith("mmroute "):
            assert unknown(words_of(line)) is None, f"{page.name}: {line}: {unknown(words_of(line))}"
        elif line.startswith("make ") and re.fullmatch(r"make [\w-]+( .*)?", line):
            assert words_of(line)[1] in TARGETS, f"{page.name}: {line}"
        elif line.startswith("python -m mmroute."):
            assert importlib.util.find_spec(words_of(line)[2]), f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_only_files_that_are_there(page):
    for line in shown(page):
        found = re.fullmatch(r"(?:src|tests|docs|examples|recipes|results)/[\w./-]+\.(?:py|md|yaml|json|txt)", line)
        if found:
            places = (ROOT, ROOT / "src" / "mmroute")
            assert any((place / line).exists() for place in places), f"{page.name}: {line}"


def test_the_check_itself_sees_what_is_wrong():
    assert unknown(words_of("mmroute eval --task maze --against none  # why")) is None
    assert unknown(words_of("mmroute eval --tusk maze")) == "--tusk"
    assert unknown(words_of("mmroute trane dare")) == "trane"
