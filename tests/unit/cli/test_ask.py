"""`mmroute ask`: a file and a question in, words or one JSON line out; what cannot be asked is one line and 1 or 2."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmroute
from mmroute import cli, hub

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "maze.png")
    return tmp_path / "maze.png"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`mmroute ask` with arguments, in this process: exit code, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmroute", "ask", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


SHORT = ("--set", "think.max_new_tokens=6")


def test_the_answer_of_the_library_is_printed_and_nothing_else(run: Run, image: Path, tiny_folder: Callable) -> None:
    folder = tiny_folder("llava")
    code, out, _ = run("where?", "-i", image, "--model", folder, *SHORT)
    with mmroute.attach(mmroute.load(folder)) as routed:
        answer = routed.answer("where?", image, think=hub.load("think", "text", max_new_tokens=6))
    assert (code, out) == (0, answer.text + "\n")


def test_json_ends_stdout_with_exactly_one_line(run: Run, image: Path, tiny_folder: Callable) -> None:
    folder = tiny_folder("qwen2_5_vl")
    arguments = ("which ball?", "-i", image, "--image", image, "--model", folder, "--recipe", "random")
    code, out, _ = run(*arguments, "--set", "prune.vision_keep=0.3", *SHORT, "--json")
    assert code == 0
    assert out.endswith("\n")
    (line,) = out.splitlines()
    said = json.loads(line)
    assert set(said) == {"question", "answer", "hops", "ar_steps", "finished", "flops", "kv_bytes", "keep"}
    assert said["question"] == "which ball?"
    assert "".join(said["hops"]) == said["answer"]
    assert (said["ar_steps"], said["finished"]) == (6, False)
    assert 0.3 <= said["keep"]["vision"] < 0.4
    assert said["keep"]["text"] == 1.0
    assert said["flops"] > said["kv_bytes"] > 0
    whole = json.loads(run("which ball?", "-i", image, "-i", image, "--model", folder, *SHORT, "--json")[1])
    assert whole["keep"]["vision"] == 1.0
    assert whole["flops"] > said["flops"]
    assert whole["kv_bytes"] > said["kv_bytes"]


def test_json_holds_any_text_in_one_line(run: Run, image: Path, tiny_folder: Callable, monkeypatch) -> None:
    from mmroute import reason

    monkeypatch.setattr(reason, "sample", lambda logits, *_: logits[:, :1].argmax(-1) + 198)  # a line break
    _, out, _ = run("where?", "-i", image, "--model", tiny_folder("llava"), *SHORT, "--json")
    assert json.loads(out)["answer"] == "\n" * 6
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("question", "options", "code", "message"),
    [
        ("", ["-i", "IMAGE"], 1, "the question is empty; write what to find out"),
        ("where?", [], 1, "no image given; at least one is needed (-i FILE"),
        ("where <image>?", ["-i", "IMAGE", "-i", "IMAGE"], 1, "2 images given, the question marks 1 places"),
        ("where?", ["-i", "absent.png"], 1, "image 1 (absent.png): no such file; check the path"),
        ("where?", ["-i", "CORRUPT"], 1, "cannot be read as an image"),
        ("where?", ["-i", "DOT"], 1, "is 1 x 1 px; allowed: sides of 4 to 10,000 px; resize or crop it"),
        ("where?", ["-i", "HUGE"], 1, "is 20000 x 120 px; allowed: sides of 4 to 10,000 px; resize or crop it"),
        ("where?", ["-i", "IMAGE", "--model", "no/where/folder"], 1, "is no folder and no bundled checkpoint"),
        ("where?", ["-i", "IMAGE", "--model", "HALF"], 1, "missing tokenizer.json"),
        ("where?", ["-i", "IMAGE", "--recipe", "oracle"], 1, "pass relevance="),
        ("where?", ["-i", "IMAGE", "--recipe", "fastw"], 2, "no recipe 'fastw'; one of "),
        ("where?", ["-i", "IMAGE", "--recipe", "fastv", "--set", "prune.vision_keep=1.3"], 2, "equal to 1 (given 1.3)"),
        (
            "where?",
            ["-i", "IMAGE", "--recipe", "random", "--set", "prune.text_keep=-0.1"],
            2,
            "equal to 0 (given -0.1)",
        ),
        ("where?", ["-i", "IMAGE", "--recipe", "schedule", "--set", "prune.vision=[1, 2]"], 2, "equal to 1 (given 2)"),
        ("where?", ["-i", "IMAGE", "--set", "prune.vision_kep"], 2, "--set takes path=value"),
        ("where?", ["-i", "IMAGE", "--set", "think.hop_pattern=[1"], 2, "is not a YAML value; quote it"),
        ("where?", ["-i", "IMAGE", "--set", "think.max_new_tokens=0"], 2, "greater than or equal to 1 (given 0)"),
        ("where?", ["-i", "IMAGE", "--set", "think.hop_pattern='('"], 2, "not a regular expression"),
        (
            "where?",
            ["-i", "IMAGE", "--recipe", "fastv", "--set", "prune.start_layer=9"],
            2,
            "the model has layers 0 to 2",
        ),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(
    run: Run,
    image: Path,
    tiny_folder: Callable,
    tmp_path: Path,
    question: str,
    options: list[str],
    code: int,
    message: str,
) -> None:
    files = {"IMAGE": image, "CORRUPT": tmp_path / "corrupt.png", "DOT": tmp_path / "dot.png"}
    files |= {"HUGE": tmp_path / "huge.png", "HALF": tmp_path / "half"}
    files["CORRUPT"].write_bytes(image.read_bytes()[:300])
    Image.new("L", (1, 1)).save(files["DOT"])
    Image.new("1", (20_000, 120)).save(files["HUGE"])
    if "HALF" in options:
        shutil.copytree(tiny_folder("llava"), files["HALF"])
        (files["HALF"] / "tokenizer.json").unlink()
    given = [files.get(option, option) for option in options]
    if "--model" not in options:
        given += ["--model", tiny_folder("llava")]
    got, out, err = run(question, *given, "--json")
    assert (got, out) == (code, "")
    *progress, said = err.splitlines()
    assert message in said
    assert said.startswith("mmroute: ")
    assert all("Loading" in line or not line for line in progress)


def test_what_cannot_be_asked_is_said_before_a_model_is_looked_for(run: Run, image: Path) -> None:
    for arguments in (["", "-i", image], ["where?"], ["where?", "-i", "absent.png"]):
        assert "no folder" not in run(*arguments, "--model", "no/where/folder")[2]


def test_wrong_usage_is_2(run: Run) -> None:
    assert run()[0] == 2
    assert run("where?", "--imag", "a.png")[0] == 2


@pytest.mark.parametrize("text", ["prune: fastv\n", "prune: [fastv]\n", "\xff\xfe"])
def test_a_recipe_file_that_is_none_is_named(
    run: Run, image: Path, tiny_folder: Callable, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text.encode("latin-1"))
    more = ("--set", "prune.vision_keep=0.3") if text.startswith("prune: f") else ()
    code, out, err = run("where?", "-i", image, "--model", tiny_folder("llava"), "--recipe", path, *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "mine" in err or "no name given" in err
