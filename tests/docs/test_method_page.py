"""What the pages on methods link to is there, near its line; python tests/docs/test_method_page.py sets the lines."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {"method.md": 80, "gate.md": 40, "latents.md": 40}
"""Of `docs`, and how many links into the source each has at least."""
LINK = re.compile(r"\[([\w.]+)\]\(\.\./((?:src|tests)/[\w/]+\.py)#L(\d+)\)")
INTO_SOURCE = re.compile(r"\]\(\.\./(?:src|tests)/")
NEAR = 10
"""Lines a place may have moved before the page must follow: an edit elsewhere in a file should not fail here, and a
reader who lands this far off still sees what is named."""
MEND = "run: python tests/docs/test_method_page.py"


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

    walk(ast.parse((ROOT / path).read_text(encoding="utf-8")), "")
    return found


def text_of(page):
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def exact(text):
    """A page's text with every link on the line of what it names."""
    return LINK.sub(lambda m: f"[{m[1]}](../{m[2]}#L{places(m[2]).get(m[1], m[3])})", text)


LINKS = [(page, name, path, int(line)) for page in PAGES for name, path, line in LINK.findall(text_of(page))]


@pytest.mark.parametrize(("page", "name", "path", "line"), LINKS)
def test_a_link_leads_to_what_it_names(page, name, path, line):
    assert name in places(path), f"{page}: {path} has no {name}; name what is there, then {MEND}"
    assert abs(places(path)[name] - line) <= NEAR, f"{page}: {name} is at line {places(path)[name]}; {MEND}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_is_checked(page):
    count = sum(where == page for where, *_ in LINKS)
    assert count == len(INTO_SOURCE.findall(text_of(page))) >= PAGES[page]


def test_lines_are_set_to_where_the_named_thing_begins():
    here = "[exact](../tests/docs/test_method_page.py#L1)"
    first = places("tests/docs/test_method_page.py")["exact"]
    assert exact(here) == here.replace("#L1)", f"#L{first})")
    assert exact(here.replace("[exact]", "[no_such]")) == here.replace("[exact]", "[no_such]")


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / "docs" / page).write_text(exact(text_of(page)), encoding="utf-8")
