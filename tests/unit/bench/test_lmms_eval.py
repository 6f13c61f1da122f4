"""The lmms-eval plug-in keeps the harness's contract, on a stand-in of its classes as 0.7.3 has them."""

import dataclasses
import importlib
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from made import picture, sample

from mmroute import hub
from mmroute import recipe as recipes
from mmroute.bench import lmms_eval_entry
from mmroute.errors import ConfigError
from mmroute.tasks import _io, _rows


@dataclasses.dataclass
class Instance:
    args: tuple


@dataclasses.dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclasses.dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclasses.dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Lmms:
    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@pytest.fixture
def harness(monkeypatch):
    """The module, imported against stand-ins of lmms-eval."""
    for name, members in {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {
            "Instance": Instance,
            "TokenCounts": TokenCounts,
            "GenerationResult": GenerationResult,
        },
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mmroute.bench.lmms_eval", raising=False)
    yield importlib.import_module("mmroute.bench.lmms_eval")
    sys.modules.pop("mmroute.bench.lmms_eval", None)


@pytest.fixture
def items():
    task = hub.load("tasks", "frozenlake", preset="nano")
    return [task, [task.sample(task.spec("val", i)) for i in range(3)]]


def chats(task):
    def to_messages(doc):
        (message,) = task.messages(doc, "cot")
        return [
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": b["image"]} if b["type"] == "image" else b for b in message["content"]
                ],
            }
        ]

    return to_messages


def test_the_manifest_names_a_chat_class(harness):
    (manifest,) = lmms_eval_entry.manifests()
    module, _, name = manifest.chat_class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, Lmms)
    assert found.is_simple is False
    assert (manifest.model_id, manifest.aliases) == ("mmroute", ("mmroute_chat",))


def test_the_project_file_registers_what_the_module_has():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["lmms_eval.models"] == {
        "mmroute": "mmroute.bench.lmms_eval_entry:manifests"
    }
    assert callable(lmms_eval_entry.manifests)


def test_generation_gives_texts_counts_and_a_side_file(harness, items, tmp_path):
    task, docs = items
    side = tmp_path / "traces.jsonl"
    model = harness.Routed("tiny", recipe="schedule", batch_size="2", max_batch_size=None, traces=str(side))
    model.task_dict = {"lake": {"test": docs}}
    settings = {"max_new_tokens": 16, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    requests = [Instance(("ctx", chats(task), dict(settings), i, "lake", "test")) for i in range(3)]
    results = model.generate_until(requests)
    assert all(isinstance(r, GenerationResult) for r in results)
    assert all(re.search(r"answer: \w+$", r.text) for r in results), "a recipe that thinks has a limit of its own"
    # nano boards have 4 x 4 tiles; one vision token each, and the words around them
    assert all(r.token_counts.input_tokens > 16 for r in results)
    assert all(0 < r.token_counts.reasoning_tokens < r.token_counts.output_tokens for r in results)
    lines = [json.loads(line) for line in side.read_text().splitlines()]
    assert [(x["task"], x["doc_id"], x["recipe"]) for x in lines] == [("lake", i, "schedule") for i in range(3)]
    counts = [(r.token_counts.output_tokens, r.token_counts.reasoning_tokens) for r in results]
    assert [(x["output_tokens"], x["reasoning_tokens"]) for x in lines] == counts
    assert all(x["flops"] > 0 and x["kv_bytes"] > 0 and 0 < x["keep"]["vision"] < 1 for x in lines)


def test_a_bare_answer_obeys_the_harness_limit(harness, items):
    task, docs = items
    model = harness.Routed("tiny", recipe="direct")
    model.task_dict = {"lake": {"test": docs}}
    (result,) = model.generate_until([Instance(("c", chats(task), {"max_new_tokens": 1}, 0, "lake", "test"))])
    assert result.token_counts.output_tokens == 1


@pytest.mark.parametrize(
    ("asked", "said", "shown"),
    [
        ("Which?\nA. red\nB. blue\nAnswer with the option's letter.", "It is red. The answer is A.", "A"),
        ("Is it? Answer yes or no.", "Yes, it is.", "yes"),
        ("What is it?", "The answer is B.", "The answer is B."),
        ("Which?\nA. red\nB. blue", "no idea", "no idea"),
    ],
)
def test_what_a_task_wants_is_read_out(harness, asked, said, shown):
    model = harness.Routed("tiny")
    assert model._extracted(asked, said) == shown


def test_likelihoods_add_up_over_tokens_and_greedy_text_is_greedy(harness, items):
    task, docs = items
    model = harness.Routed("tiny")
    model.task_dict = {"lake": {"test": docs}}
    words = task.words(task.spec("val", 0), "direct")

    def asked(text):
        context = f"task: frozenlake {' '.join(task.question_words(task.spec('val', 0)))} direct:"
        return Instance((context, text, lambda doc: [doc.images[0]], 0, "lake", "test"))

    one, both = model.loglikelihood([asked("answer:"), asked(f"answer: {words.response[1]}")])
    assert both[0] < one[0] < 0
    written = "answer:" if one[1] else None
    assert written is None or one[0] > -0.7  # a greedy token has at least half of the mass among two, here nearly all
    (through,) = model.loglikelihood([asked(lambda doc: "answer:")])
    assert through == one


def test_rounds_go_on_until_the_task_ends_them(harness, items):
    docs = items[1]
    model = harness.Routed("tiny", recipe="direct")
    model.task_dict = {"lake": {"test": docs}}
    told = []

    def to_text(doc, previous_output, round_idx, previous_round_info):
        told.append((list(previous_output), round_idx, previous_round_info))
        return [doc.images[0]], "task: frozenlake direct:", round_idx == 2, previous_output, "kept"

    request = Instance(
        ("task: frozenlake direct:", {"max_new_tokens": 2}, lambda d: [d.images[0]], to_text, 0, "lake", "test")
    )
    (rounds,) = model.generate_until_multi_round([request])
    assert len(rounds) == 2
    assert [(len(said), i, info) for said, i, info in told] == [(1, 1, None), (2, 2, "kept")]


def test_an_unknown_argument_and_a_video_are_refused(harness):
    with pytest.raises(ConfigError, match="no argument 'recpie'; known: pretrained, recipe"):
        harness.Routed("tiny", recpie="none")
    with pytest.raises(ConfigError, match="shows a video"):
        harness._chat({"role": "user", "content": [{"type": "video", "url": "x"}]})


class _Loader(yaml.SafeLoader):
    """Reads `!function` as the name that follows."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_shipped_tasks_name_tasks_and_functions_that_exist():
    folder = lmms_eval_entry.TASKS
    shared = yaml.load((folder / "_mmroute_items").read_text(), Loader=_Loader)
    spec = importlib.util.spec_from_file_location("mmroute_items", folder / "mmroute_items.py")
    functions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(functions)
    for key in ("doc_to_visual", "doc_to_text", "process_results"):
        assert callable(getattr(functions, shared[key].split(".")[1]))
    files = sorted(folder.glob("*.yaml"))
    assert len(files) == 12
    for file in files:
        config = yaml.load(file.read_text(), Loader=_Loader)
        name = config["task"].removeprefix("mmroute_")
        assert file.stem == config["task"]
        assert name in hub.names("tasks")
        assert config["include"] == "_mmroute_items"
        assert config["dataset_kwargs"]["data_files"] == {"test": f"data/mmroute/{name}/test-*.parquet"}


def test_shipped_functions_ask_and_score_by_the_items_own_task(tmp_path):
    datasets = pytest.importorskip("datasets")
    from mmroute.tasks._export import lmms_process, lmms_text, lmms_visual

    datasets.disable_progress_bars()
    made = sample(task="mmmath", choices=[], answer="12", answer_index=-1, question="How long?", hops=[])
    _io.write([made], tmp_path / "d", "parquet")
    rows = datasets.load_dataset("parquet", data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "c"))
    (doc,) = rows["test" if "test" in rows else "train"]
    assert lmms_text(doc) == "How long?\nReason step by step and put the answer into \\boxed{}."
    assert [i.tobytes() for i in lmms_visual(doc)] == [picture(0).tobytes()]
    assert lmms_process(doc, [r"so \boxed{12.0}"]) == {"acc": 1.0}
    assert lmms_process(doc, [r"\boxed{13}"]) == {"acc": 0.0}
    bare = {key: value for key, value in doc.items() if key != "images"}  # as the harness scores, and asks for texts
    assert lmms_text(bare) == lmms_text(doc)
    assert lmms_process(bare, [r"\boxed{12}"]) == {"acc": 1.0}


def test_an_item_of_ours_is_asked_in_the_words_that_the_model_knows(harness, items, tmp_path):
    task, docs = items
    made = docs[0]
    (row,) = [{**_rows.row_of(made), "images": made.images}]
    side = tmp_path / "traces.jsonl"
    model = harness.Routed("tiny", traces=str(side))
    model.task_dict = {"lake": {"test": [row]}}

    def plain(doc):
        return [
            {"role": "user", "content": [{"type": "image", "url": made.images[0]}, {"type": "text", "text": "Hm?"}]}
        ]

    (result,) = model.generate_until([Instance(("c", plain, {"max_new_tokens": 8}, 0, "lake", "test"))])
    assert json.loads(side.read_text())["id"] == made.id
    with recipes.equip(model.loaded, model.recipe) as (routed, think):
        (answer,) = routed.answer_many([task.messages(made, think.style)], think=think)
    assert result.text == answer.text != ""
    assert harness._own_words(routed, think, {"question": "of another dataset"}) is None
