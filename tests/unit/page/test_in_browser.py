"""The page in a real browser: its dials, keys and themes show what the trace holds; nothing is fetched."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import NAMES, Browser, Page, executable
from page_samples import told

from mmroute import page
from mmroute.page import View

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(executable() is None, reason=f"no Chromium here ({', '.join(NAMES)}); apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def view(tiny_folder) -> View:
    return page.view(told(tiny_folder("qwen2_5_vl")))


@pytest.fixture(scope="module")
def file(view: View, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "trace.html"
    path.write_text(page.render([view, view]), encoding="utf-8")
    return path


def counted(view: View, layer: int) -> str:
    p = view.pictures[0]
    patches = range(p["start"], p["start"] + p["rows"] * p["columns"])
    return f"{sum(c in patches for c in view.ran[layer])} of {len(patches)} patches ran"


def spoken(view: View, layer: int, hop: int) -> str:
    words = [c for c, kind in enumerate(view.modality) if kind == 0 and view.hop[c] <= hop]
    return f"{sum(c in view.ran[layer] for c in words)} of {len(words)} ran layer {layer}"


def test_every_place_of_the_dials_says_what_the_trace_says(browser: Browser, file: Path, view: View) -> None:
    shown = browser.open(file)
    for layer in range(len(view.ran)):
        for hop in range(len(view.kv_full)):
            shown.value(
                f"for (const [id, at] of [['layer', {layer}], ['hop', {hop}]]) {{"
                "const dial = document.getElementById(id); dial.value = at; dial.dispatchEvent(new Event('input')); }"
            )
            assert shown.text("patches").startswith(counted(view, layer))
            assert shown.text("spoken") == spoken(view, layer, hop)
            held = sum(row[hop] for row in view.kv)
            assert f"{100 * held / (view.kv_full[hop] * len(view.kv)):.0f} % of unrouted" in shown.text("growth")
            lost = {c for c in view.lost[layer] if view.lost[layer][c] <= hop and view.modality[c] == 0}
            assert shown.value("document.querySelectorAll('#story .lost').length") == len(lost)
    assert shown.requests == []
    assert shown.faults == []


def test_keys_turn_the_dials_and_walk_over_the_picture(browser: Browser, file: Path, view: View) -> None:
    shown = browser.open(file)
    shown.key("ArrowDown")
    shown.key("ArrowRight")
    assert (shown.value("state.layer"), shown.value("state.hop")) == (1, 1)
    assert shown.text("patches").startswith(counted(view, 1))
    shown.key("ArrowUp")
    shown.key("ArrowUp")  # stops at the first
    assert shown.value("state.layer") == 0
    shown.key("s")
    assert shown.value("document.getElementById('scores').getAttribute('aria-pressed')") == "true"
    shown.value("document.getElementById('picture').focus()")
    shown.key("ArrowRight")
    shown.key("ArrowRight")
    assert shown.text("read").startswith("row 0, column 1: ")
    assert shown.value("state.hop") == 1
    reached = set()
    for _ in range(40):
        shown.key("Tab")
        reached.add(shown.value("document.activeElement.id"))
    assert {"hop", "layer", "kept", "scores", "picture", "theme"} <= reached
    shown.value("document.getElementById('layer').focus()")
    shown.key("ArrowRight")  # a dial that has the focus takes the arrows itself
    assert (shown.value("state.layer"), shown.value("state.hop")) == (1, 1)
    assert shown.faults == []


def test_the_picture_is_dark_where_a_patch_did_not_run(browser: Browser, file: Path, view: View) -> None:
    layer = len(view.ran) - 1
    shown = browser.open(file, f"#layer={layer}")
    shown.value("image.decode().then(draw)")
    p = view.pictures[0]
    for patch in range(p["rows"] * p["columns"]):
        red, green, blue = shown.value(
            f"(() => {{ const c = document.getElementById('picture'), w = c.width / {p['columns']}, "
            f"h = c.height / {p['rows']}, d = c.getContext('2d').getImageData({patch % p['columns']} * w + w / 2, "
            f"{patch // p['columns']} * h + h * .8, 1, 1).data; return [d[0], d[1], d[2]]; }})()"
        )
        dark = max(red, green, blue) < 90
        assert dark != (p["start"] + patch in view.ran[layer]), f"patch {patch}: {red, green, blue}"


def test_the_address_holds_the_place_and_wrong_ones_do_no_harm(browser: Browser, file: Path, view: View) -> None:
    shown = browser.open(file, "#trace=1&hop=2&layer=1&show=scores")
    assert shown.value("[state.trace, state.hop, state.layer, state.scores]") == [1, 2, 1, True]
    shown.key("ArrowDown")
    assert "layer=2" in shown.value("location.hash")
    wrong = browser.open(file, "#trace=9&hop=-3&layer=99&show=x")
    assert wrong.value("[state.trace, state.hop, state.layer]") == [1, 0, len(view.ran) - 1]
    assert wrong.faults == []


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_follow_the_system_and_the_button(browser: Browser, file: Path, dark: bool) -> None:
    def is_dark(shown: Page) -> bool:
        channels = (
            shown.value("getComputedStyle(document.body).backgroundColor").partition("(")[2].strip(")").split(",")
        )
        return sum(map(int, channels)) < 380

    shown = browser.open(file, dark=dark)
    assert is_dark(shown) == dark
    shown.key("t")
    assert is_dark(shown) != dark


@pytest.mark.parametrize("width", [360, 768, 1280, 2560])
def test_nothing_runs_over_the_edge(browser: Browser, file: Path, width: int) -> None:
    shown = browser.open(file, size=(width, 900))
    assert shown.value("document.documentElement.scrollWidth") <= width


def test_a_browser_that_is_not_there_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert executable() is None
