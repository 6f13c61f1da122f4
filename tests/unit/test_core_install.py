"""With the core dependencies alone every module imports, or says what to install.

A subprocess is shown only the standard library, mmroute, and what the core dependencies bring by themselves.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CORE_ONLY = '''
import importlib, importlib.machinery, importlib.metadata, re, sys, tomllib
from pathlib import Path
from packaging.requirements import Requirement

source, project = Path(sys.argv[1]), tomllib.loads(Path(sys.argv[2]).read_text())["project"]
normal = lambda name: re.sub("[-_.]+", "-", name).lower()
brings, left = {"mmroute"}, [Requirement(line) for line in project["dependencies"]]
while left:
    wanted = left.pop()
    if normal(wanted.name) not in brings:
        brings.add(normal(wanted.name))
        further = map(Requirement, importlib.metadata.requires(wanted.name) or [])
        left += [each for each in further if each.marker is None or each.marker.evaluate({"extra": ""})]
owners = importlib.metadata.packages_distributions()
hidden = {name for name, by in owners.items() if not brings & {normal(each) for each in by}}


class CoreOnly(importlib.machinery.PathFinder):
    """Finds neither modules nor metadata of what only extras and tests need."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *given, **named):
        found = super().find_distributions(*given, **named)
        return (each for each in found if normal(each.metadata["Name"]) in brings)


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = CoreOnly
from mmroute.errors import MissingExtra

for file in sorted((source / "mmroute").rglob("*.py")):
    if "lmms_tasks" in file.parts:  # read by lmms-eval, by path
        continue
    name = ".".join(file.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
    try:
        importlib.import_module(name)
        print(name, "imports")
    except MissingExtra as error:
        print(name, "says", error)
print("hidden", *sorted(hidden))
'''


def test_every_module_imports_or_says_what_to_install() -> None:
    command = [sys.executable, "-W", "error", "-c", CORE_ONLY, str(ROOT / "src"), str(ROOT / "pyproject.toml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    *modules, hidden = done.stdout.splitlines()
    assert {"accelerate", "peft", "datasets", "pyarrow", "matplotlib", "starlette", "openai"} <= set(hidden.split())
    told = {name: said for name, how, said in (line.split(" ", 2) for line in modules if " says " in line)}
    assert len(modules) - len(told) > 300
    service = {name: said for name, said in told.items() if name.startswith("mmroute.serve")}
    assert len(service) > 10 and all('pip install "mmroute[serve]"' in said for said in service.values())
    assert set(told) - set(service) == {"mmroute.bench.lmms_eval"}
    assert "make .venv-lmms" in told["mmroute.bench.lmms_eval"]
