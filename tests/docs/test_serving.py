"""docs/serving.md names every setting, header, reason and metric there is, and none that is not; its examples parse."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from mmroute import serve
from mmroute.bench import nginx
from mmroute.serve.book import Book
from mmroute.serve.settings import Settings, UpstreamSettings, read

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
EXAMPLES = ROOT / "examples" / "serving"
SOURCE = "".join(p.read_text(encoding="utf-8") for p in sorted(Path(serve.__file__).parent.glob("*.py")))


def table(heading):
    """The first cells of the rows under a table's head."""
    rows = GUIDE[GUIDE.index(heading) :].splitlines()[2:]
    return " ".join(
        row.split("|")[1] for row in rows[: next(i for i, r in enumerate([*rows, ""]) if not r.startswith("|"))]
    )


def names(model):
    for name, field in model.model_fields.items():
        inner = field.annotation
        nested = isinstance(inner, type) and issubclass(inner, BaseModel) and inner is not UpstreamSettings
        yield from (f"{name}.{each}" for each in names(inner)) if nested else [name]


def test_every_setting_is_told():
    assert set(re.findall(r"`([\w.]+)`", table("| setting | default |"))) == set(names(Settings))
    told = GUIDE[GUIDE.index("Of each model:") : GUIDE.index("**Images by address.**")]
    assert set(re.findall(r"`(\w+)`", told)) == set(UpstreamSettings.model_fields)


def test_every_header_is_told():
    told = set(re.findall(r"`x-([\w-]+)`", table("| header | |")))
    turn = Path(serve.__file__).with_name("turn.py").read_text()
    sent = set(re.findall(r'"x-([\w-]+)"', turn)) | {
        f"mmroute-{n}" for n in re.findall(r'"([\w-]+)": ', turn[turn.index("numbers = {") : turn.index("out.update")])
    }
    assert told == sent


def test_every_reason_is_told():
    told = set(re.findall(r"`(\w+)`", table("| reason | the route")))
    page = Path(serve.__file__).with_name("page").joinpath("page.js").read_text()
    shown = set(re.findall(r"(\w+): [\"{]", page[page.index("const REASONS") : page.index("function decide")])) - {
        "draft",
        "target",
    }
    assert told == shown
    given = SOURCE + (ROOT / "src" / "mmroute" / "gate" / "base.py").read_text()
    assert all(f'"{reason}"' in given for reason in told)


def test_every_metric_is_told(tmp_path):
    told = dict(re.findall(r"`(mmroute_\w+?)(?:\{([\w,]+)\})?`", table("| metric | |")))
    there = {}
    for metric in Book(Settings()).registry.collect():
        kind = "_total" if metric.type == "counter" else ""
        there[metric.name + kind] = metric.name
    assert set(told) == set(there)


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda p: p.name)
def test_an_example_is_short_and_the_guide_or_its_neighbour_names_it(path):
    assert len(path.read_text().splitlines()) < 60
    assert path.name in GUIDE + (EXAMPLES / "compose.yaml").read_text()


def test_the_composed_gateway_has_settings_that_are_read():
    settings = read(EXAMPLES / "gateway.yaml")
    services = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())["services"]
    for role in ("draft", "target"):
        upstream = getattr(settings, role)
        assert upstream.url == f"http://{role}:8000/v1"
        assert upstream.model in services[role]["command"]
    assert services["gateway"]["command"][:2] == ["serve", "--config"]
    scraped = yaml.safe_load((EXAMPLES / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    assert scraped == [{"targets": [f"gateway:{settings.port}"]}]


def test_the_ray_example_builds_the_application():
    text = (EXAMPLES / "ray_serve.py").read_text()
    scope = {"__name__": "example"}
    exec(compile(ast.parse(text), "ray_serve.py", "exec"), scope)
    app = scope["application"]("http://127.0.0.1:1/v1#a", "http://127.0.0.1:2/v1#b", 0.3, 2)
    assert app.state.gateway.served == ["a", "b"]
    assert app.state.gateway.live.decider.budget == 0.3
    assert app.state.gateway.settings.replicas == 2


def test_the_balancers_configuration_is_valid(tmp_path):
    program = nginx.binary()
    if program is None:
        pytest.skip("no nginx here; apt-get install nginx-light")
    file = tmp_path / "balancer.conf"
    file.write_text(nginx.settled((EXAMPLES / "balancer.conf").read_text(), tmp_path))
    done = subprocess.run(
        [program, "-t", "-p", str(tmp_path), "-c", str(file)], capture_output=True, text=True, check=False
    )
    assert "syntax is ok" in done.stderr, done.stderr
