"""The gateway's page: small, nothing from outside, its parts there; in a browser it asks and shows why, by keyboard."""

import asyncio
import hashlib
import re
import subprocess
import sys
import time
from importlib.resources import files

import httpx2 as httpx
import pytest
from browser import NAMES, Browser, executable
from gateways import rig

from mmroute.bench.gateway_processes import free_port, started

FILES = {p.name: p.read_text(encoding="utf-8") for p in files("mmroute.serve").joinpath("page").iterdir()}


def test_the_page_is_three_small_files_that_refer_to_nothing_outside():
    assert set(FILES) == {"index.html", "page.css", "page.js"}
    assert sum(map(len, FILES.values())) < 60_000
    for name, text in FILES.items():
        addresses = (
            set(re.findall(r"(?:https?:)?//[\w.]+", text))
            if name != "page.js"
            else set(re.findall(r"https?://[\w.]+", text))
        )
        assert addresses <= {"http://www.w3.org"}, name  # a namespace, never fetched
    fetched = re.findall(r'(?:src|href)="([^"#]+)"', FILES["index.html"])
    assert sorted(fetched) == ["data:,", "page.css", "page.js"]


def test_every_part_the_script_asks_for_is_in_the_page():
    asked = set(re.findall(r'\$\("(\w+)"\)', FILES["page.js"])) | {
        "draftbar",
        "targetbar",
        "draftrating",
        "targetrating",
    }
    assert asked <= set(re.findall(r'id="(\w+)"', FILES["index.html"]))
    labelled = set(re.findall(r'<label[^>]* for="(\w+)"', FILES["index.html"]))
    inputs = set(re.findall(r'<(?:input|textarea)[^>]* ?id="(\w+)"', FILES["index.html"]))
    assert inputs == labelled


def test_the_page_is_served_under_a_policy_that_lets_nothing_else_in():
    async def run():
        async with rig() as r:
            for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
                reply = await r.http.get(path)
                assert reply.headers["content-type"].startswith(kind)
                assert "default-src 'self'" in reply.headers["content-security-policy"]
                assert "unsafe" not in reply.headers["content-security-policy"]

    asyncio.run(run())


class Address(str):
    """A web address where the browser helper takes a file."""

    def resolve(self):
        return self

    def as_uri(self):
        return str(self)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`mmroute serve` on the bundled model, as a user starts it."""
    port = free_port()
    code = "import sys; from mmroute.cli import main; sys.argv[0] = 'mmroute'; main()"
    with (tmp_path_factory.mktemp("page") / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", code, "serve", "--port", str(port)], stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(900):
            try:
                if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """A gateway before scripted servers, that asks for the key k1."""
    keys = tmp_path_factory.mktemp("locked") / "keys"
    keys.write_text(f"ann:{hashlib.sha256(b'k1').hexdigest()}\n")
    with started({"api_keys_file": str(keys), "timeouts": {"rating_s": 30}}) as processes:
        yield processes.url("gateway")


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.mark.browser
@pytest.mark.skipif(executable() is None, reason=f"no Chromium here ({', '.join(NAMES)}); apt-get install chromium")
class TestInABrowser:
    def until(self, shown, expression, seconds=180):
        """Waits for the page."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if shown.value(expression):
                return
            time.sleep(0.1)
        raise AssertionError(f"never true: {expression}; the page says {shown.value('document.body.innerText')[:600]}")

    def ask_example(self, shown):
        shown.value("document.querySelector('[data-task=maze]').focus()")
        shown.key("Enter")
        self.until(shown, "document.getElementById('question').value.length > 0")
        shown.value("document.getElementById('question').focus()")
        down = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": 2}
        shown.call("Input.dispatchKeyEvent", type="keyDown", **down)
        shown.call("Input.dispatchKeyEvent", type="keyUp", **down)
        self.until(shown, "document.getElementById('timing').textContent.includes('in all')")

    def test_a_question_is_asked_by_keyboard_answered_and_explained(self, browser, served):
        shown = browser.open(Address(f"{served}/"))
        shown.call("Log.enable")
        self.until(shown, "!document.getElementById('examples').hidden")
        self.ask_example(shown)
        right = shown.value("document.getElementById('question').dataset.answer")
        route = shown.text("badge").split(":")[0]
        assert route in ("draft", "target")
        # On a busy machine the rating may be late, and the draft, which cannot do mazes, answers.
        assert re.search(r"answer: [A-D]$", shown.text("text"))
        assert route == "draft" or shown.text("text").endswith(right)
        assert "threshold" in shown.text("numbers")
        assert re.fullmatch(r"\d+ %", shown.text("draftrating"))
        assert "runs 100 of 100 patches" in shown.text("kept")
        shown.value("document.getElementById('layer').focus()")
        for _ in range(4):
            shown.key("ArrowRight")
        assert shown.value("+document.getElementById('layer').value") == 4
        self.until(shown, "document.querySelectorAll('#recent tr').length >= 1")
        assert "GFLOPs" in shown.text("costtext")
        assert shown.faults == []
        assert all(address.startswith(served) for address in shown.requests)
        entries = [e["params"]["entry"]["text"] for e in browser.events if e.get("method") == "Log.entryAdded"]
        assert entries == []  # the content policy was never offended

    def test_the_dial_sends_everything_one_way(self, browser, served):
        shown = browser.open(Address(f"{served}/"))
        self.until(shown, "!document.getElementById('examples').hidden")
        for value, route in ((0, "draft"), (100, "target")):
            shown.value(
                f"(d => {{ d.value = {value}; d.dispatchEvent(new Event('input')); }})"
                "(document.getElementById('budget'))"
            )
            self.ask_example(shown)
            assert shown.text("badge").startswith(f"{route}:")

    def test_a_picture_from_outside_is_asked_about_and_the_curves_grow(self, browser, served):
        shown = browser.open(Address(f"{served}/"))
        self.until(shown, "!document.getElementById('examples').hidden")
        self.ask_example(shown)
        own = shown.value("document.getElementById('preview').src")
        shown.value("document.getElementById('clear').click()")
        assert shown.value("document.getElementById('preview').hidden")
        shown.value(  # as a file manager or a screenshot tool hands it over
            "(bytes => { const data = new DataTransfer();"
            "data.items.add(new File([bytes], 'own.png', {type: 'image/png'}));"
            "document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data})); })"
            f"(Uint8Array.from(atob({own.partition(',')[2]!r}), c => c.charCodeAt(0)))"
        )
        self.until(shown, "!document.getElementById('preview').hidden")
        assert shown.value("document.getElementById('preview').src") == own
        before = shown.value("fetch('stats').then(r => r.json()).then(s => s.totals.ok)")
        shown.value("document.getElementById('question').value = 'Which exit is reached?'")
        shown.value("document.getElementById('form').requestSubmit()")
        self.until(shown, "document.getElementById('timing').textContent.includes('in all')")
        assert shown.value("fetch('stats').then(r => r.json()).then(s => s.totals.ok)") == before + 1
        assert "tokens read" in shown.text("timing")
        self.until(shown, "document.querySelectorAll('#timeplot ellipse').length >= 2")
        for name in ("share", "cost"):
            drawn = shown.value(f"document.querySelector('#{name}plot path.a').getAttribute('d')")
            assert drawn.count("L") >= 1, name
        assert "of always asking the target" in shown.text("costtext")
        assert re.search(r"(draft|target) \d+ ms", shown.text("timetext"))
        assert shown.faults == []

    def test_a_key_is_asked_for_where_one_is_needed_and_stays_in_the_tab(self, browser, locked):
        shown = browser.open(Address(f"{locked}/"))
        self.until(shown, "document.getElementById('models').textContent === 'a key is needed'")
        assert not shown.value("document.getElementById('keybox').hidden")
        shown.value("document.getElementById('key').focus()")
        for letter in "k1":
            shown.key(letter)
        shown.key("Enter")
        self.until(shown, "document.getElementById('models').textContent.includes('rates and answers')")
        shown.value("document.getElementById('question').value = 'hello'")
        shown.value("document.getElementById('form').requestSubmit()")
        self.until(shown, "document.getElementById('timing').textContent.includes('in all')")
        assert shown.text("text").split()[0] in ("draft", "target")
        assert shown.value("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        assert shown.value("location.href") == f"{locked}/"

    def test_a_failure_is_said_and_the_page_goes_on(self, browser, served):
        shown = browser.open(Address(f"{served}/"), dark=True, size=(420, 900))
        shown.value("(q => { q.value = 'word '.repeat(3); })(document.getElementById('question'))")
        shown.value(
            "window.fetch = (f => (a, o) => o && o.method ? Promise.reject(new Error('no way')) : f(a, o))"
            "(window.fetch)"
        )
        shown.value("document.getElementById('form').requestSubmit()")
        self.until(shown, "document.getElementById('badge').textContent === 'failed'")
        assert shown.text("why") == "no way"
        assert shown.value("document.getElementById('send').disabled") is False
        assert shown.value("document.documentElement.scrollWidth <= window.innerWidth")
