"""What docs/method.md links to is there, near its line; python tests/docs/test_method_page.py sets the lines."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "method.md"
LINK = re.compile(r"\[([\w.]+)\]\(\.\./((?:src|tests)/[\w/]+\.py)#L(\d+)\)")
NEAR = 40
"""Lines a place may have moved before the page must follow."""


@cache
def places(path):
    """Line by dotted name: classes, functions, and what a class or module assigns."""
    found = {}

    def walk(node, prefix):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                found[prefix + child.name] = child.lineno
                if isinstance(child, ast.ClassDef):
                    walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.AnnAssign | ast.Assign):
                for target in getattr(child, "targets", None) or [child.target]:
                    if isinstance(target, ast.Name):
                        found[prefix + target.id] = child.lineno

    walk(ast.parse((PAGE.parents[1] / path).read_text(encoding="utf-8")), "")
    return found


def links():
    return [(name, path, int(line)) for name, path, line in LINK.findall(PAGE.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("name", "path", "line"), links())
def test_a_link_leads_to_what_it_names(name, path, line):
    assert name in places(path), f"{path} has no {name}"
    assert abs(places(path)[name] - line) <= NEAR, "run: python tests/docs/test_method_page.py"


def test_every_link_of_the_page_is_checked():
    text = PAGE.read_text(encoding="utf-8")
    assert len(links()) == text.count("](../") > 30


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(LINK.sub(lambda m: f"[{m[1]}](../{m[2]}#L{places(m[2]).get(m[1], m[3])})", text), encoding="utf-8")
