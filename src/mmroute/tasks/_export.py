"""Samples in the formats of other people's tools: TRL, LLaVA, ShareGPT, VLMEvalKit, lmms-eval, MVoT.

| name | writes | opened by |
|---|---|---|
| `trl` | `metadata.jsonl` with `messages`, `images/` | TRL's trainers, by `load_dataset("imagefolder", data_dir=DIR)` |
| `llava` | `data.json` with `conversations`, `images/` | LLaVA's and its descendants' trainers |
| `sharegpt` | `data.json` with `messages`, `dataset_info.json`, `images/` | LLaMA-Factory, ms-swift |
| `vlmeval` | one TSV with the pictures inside | VLMEvalKit, from `$LMUData` |
| `lmms` | YAML, its functions, Parquet | lmms-eval, `--include_path DIR` |
| `mvot` | MVoT's tree, see `_mvot` | MVoT's own loader |

A conversation is the question, then one assistant turn: the hops' texts, each followed by its picture where it has one,
and the answer. Pictures are listed in the order in which the turns show them. For plain English throughout make the
samples with `--set task.hop_text=sentence`; the default writes hops in the short words of the small models.
"""

import base64
import csv
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mmroute.errors import ConfigError, InputError
from mmroute.tasks._io import new_folder
from mmroute.tasks._mvot_export import to_mvot
from mmroute.tasks._parquet import write_parquet
from mmroute.tasks._pictures import png_bytes
from mmroute.tasks._rows import sample_of
from mmroute.tasks.base import Choice, Sample

__all__ = ["EXPORTERS", "export", "lmms_process", "lmms_sample", "lmms_text", "lmms_visual", "turns"]

IMAGE_TAG = "<image>"


def export(samples: Iterable[Sample], to: str, out: Path) -> int:
    """Writes samples as a new folder in another tool's format; returns how many.

    Raises:
        ConfigError: no such format.
        InputError: no samples, one the format cannot hold, or a place that cannot be written.
        MissingExtra: `lmms` without pyarrow.
    """
    name = _OTHER_NAMES.get(to, to)
    if name not in EXPORTERS:
        raise ConfigError(f"no export format named {to!r}; one of {', '.join(EXPORTERS)}")
    return EXPORTERS[name](samples, out)


# ---------------------------------------------------------------------- conversations


class _Turns(NamedTuple):
    user: list[str | int]
    """Texts, and indices of the sample's images."""
    assistant: list[str | int]


def turns(sample: Sample) -> _Turns:
    """The question and the reasoned answer as texts and image indices, in the order they are read."""
    user: list[str | int] = [*sample.prompt_images, question_text(sample.question, sample.choices)]
    assistant: list[str | int] = []
    for hop in sample.hops:
        assistant += [text for text in [hop.text] if text]
        assistant += [hop.image] if hop.image >= 0 else []
    return _Turns(user, [*assistant, sample.answer_text or sample.answer])


def question_text(question: str, choices: Sequence[Choice]) -> str:
    """The question; options that it does not spell out itself follow as lines `A. red plate`."""
    lettered = all(re.fullmatch("[A-Z]", c.label) for c in choices)
    lines = [f"{c.label}. {c.text}" for c in choices if c.text] if lettered else []
    spelled = any(re.search(rf"(?m)^\(?{c.label}[.):]", question) for c in choices) if lettered else False
    return "\n".join([question, *lines]) if lines and not spelled else question


def _shown(sample: Sample) -> list[Any]:
    """Pictures in the order of the turns; one shown twice is listed twice, as placeholders are counted."""
    both = turns(sample)
    return [sample.images[part] for part in (*both.user, *both.assistant) if isinstance(part, int)]


def _tagged(parts: Sequence[str | int], sample: Sample) -> str:
    """One string: a tag and a new line for each picture, spaces between texts that follow each other."""
    out = ""
    for part in parts:
        if isinstance(part, int):
            out += f"{IMAGE_TAG}\n"
        elif IMAGE_TAG in part:
            raise InputError(f"{sample.id}: a text holds {IMAGE_TAG!r}, which this format counts as a picture; use trl")
        else:
            out += part if not out or out.endswith("\n") else f" {part}"
    return out.removesuffix("\n")


def _save_images(folder: Path, number: int, images: Sequence[Any]) -> list[str]:
    names = [f"images/{number:06d}_{k}.png" for k in range(len(images))]
    for name, image in zip(names, images, strict=True):
        (folder / name).write_bytes(png_bytes(image))
    return names


def _numbered(samples: Iterable[Sample], out: Path) -> Iterator[tuple[int, Sample]]:
    number = -1
    for number, sample in enumerate(samples):
        yield number, sample
    if number < 0:
        raise InputError(f"{out}: there are no samples to export")


def _trl(samples: Iterable[Sample], out: Path) -> int:
    count = 0
    with new_folder(out) as folder, (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        (folder / "images").mkdir()
        for number, sample in _numbered(samples, out):
            both = turns(sample)
            row = {
                "file_names": _save_images(folder, number, _shown(sample)),
                "messages": [
                    {"role": "user", "content": [_block(p) for p in both.user]},
                    {"role": "assistant", "content": [_block(p) for p in both.assistant]},
                ],
                "id": sample.id,
                "answer": sample.answer,
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _block(part: str | int) -> dict[str, str]:
    # Footgun: a key `image` here, even with None, makes TRL take it for the picture itself.
    return {"type": "image"} if isinstance(part, int) else {"type": "text", "text": part}


def _llava(samples: Iterable[Sample], out: Path) -> int:
    rows: list[dict[str, Any]] = []
    with new_folder(out) as folder:
        (folder / "images").mkdir()
        for number, sample in _numbered(samples, out):
            both = turns(sample)
            names = _save_images(folder, number, _shown(sample))
            row: dict[str, Any] = {"id": sample.id}
            if names:
                row["image"] = names[0] if len(names) == 1 else names
            row["conversations"] = [
                {"from": "human", "value": _tagged(both.user, sample)},
                {"from": "gpt", "value": _tagged(both.assistant, sample)},
            ]
            rows.append(row)
        _write_json(folder / "data.json", rows)
    return len(rows)


def _sharegpt(samples: Iterable[Sample], out: Path) -> int:
    rows: list[dict[str, Any]] = []
    with new_folder(out) as folder:
        (folder / "images").mkdir()
        for number, sample in _numbered(samples, out):
            both = turns(sample)
            messages = [
                {"role": "user", "content": _tagged(both.user, sample)},
                {"role": "assistant", "content": _tagged(both.assistant, sample)},
            ]
            rows.append({"messages": messages, "images": _save_images(folder, number, _shown(sample))})
        _write_json(folder / "data.json", rows)
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        entry = {
            "file_name": "data.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": tags,
        }
        _write_json(folder / "dataset_info.json", {"mmroute": entry})
    return len(rows)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------- harnesses


def _vlmeval(samples: Iterable[Sample], out: Path) -> int:
    items = [item for _, item in _numbered(samples, out)]
    # The harness knows multiple choice by the columns A, B ..; a table of yes/no questions has none.
    words = {c.label.casefold() for item in items for c in item.choices}
    most = max(len(item.choices) for item in items)
    if most > len(string.ascii_uppercase):
        raise InputError(f"an item has {most} choices, and VLMEvalKit has letters for 26; take another format")
    letters = "" if words <= {"yes", "no"} else string.ascii_uppercase[:most]
    columns = ["index", "id", "category", "split", "image", "question", *letters, "answer"]
    tables = sorted({f"{item.task}_{item.split}" for item in items})
    with new_folder(out) as folder:
        path = folder / f"mmroute_{tables[0] if len(tables) == 1 else 'mixed'}.tsv"
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", restval="")
            table.writeheader()
            for number, item in enumerate(items):
                table.writerow(_vlmeval_row(number, item, letters))
    return len(items)


def _vlmeval_row(number: int, item: Sample, letters: str) -> dict[str, Any]:
    shown = [base64.b64encode(png_bytes(item.images[i])).decode() for i in item.prompt_images]
    row = {
        "index": number,
        "id": item.id,
        "category": item.task,
        "split": item.split,
        # Several pictures are written as a list, as the harness's own tables of several pictures do.
        "image": shown[0] if len(shown) == 1 else json.dumps(shown),
        "question": item.question,
        "answer": letters[item.answer_index] if letters and item.choices else item.answer,
    }
    return row | {letter: c.text or c.label for letter, c in zip(letters, item.choices, strict=False)}


_LMMS_MODULE = '''"""How lmms-eval shows and scores these items (needs mmroute); made by `mmroute data export`."""

from mmroute.tasks._export import lmms_process, lmms_text, lmms_visual  # noqa: F401
'''


def _lmms(samples: Iterable[Sample], out: Path) -> int:
    seen: dict[str, None] = {}
    tasks: dict[str, None] = {}

    def noted() -> Iterator[Sample]:
        for _, sample in _numbered(samples, out):
            seen.setdefault(sample.split)
            tasks.setdefault(sample.task)
            yield sample

    with new_folder(out) as folder:
        (folder / "data").mkdir()
        count = write_parquet(noted(), folder / "data")
        name = f"mmroute_{next(iter(tasks)) if len(tasks) == 1 else 'mixed'}"
        # `datasets` reads relative paths from the working directory, so this one has to be absolute.
        data = Path(out).absolute() / "data"
        config = {
            "task": name,
            "dataset_path": "parquet",
            "dataset_kwargs": {"data_files": {split: f"{data}/{split}-*.parquet" for split in seen}},
            "test_split": "test" if "test" in seen else next(iter(seen)),
            "output_type": "generate_until",
            "doc_to_visual": _Function("mmroute_items.lmms_visual"),
            "doc_to_text": _Function("mmroute_items.lmms_text"),
            "doc_to_target": "answer",
            "process_results": _Function("mmroute_items.lmms_process"),
            "generation_kwargs": {"max_new_tokens": 512, "temperature": 0, "do_sample": False},
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": [{"version": 1.0}],
        }
        note = "# Moved the folder? Change data_files.\n"
        (folder / f"{name}.yaml").write_text(note + yaml.dump(config, Dumper=_Dumper, sort_keys=False))
        (folder / "mmroute_items.py").write_text(_LMMS_MODULE)
    return count


class _Function(str):
    """A value that lmms-eval's YAML writes as `!function file.name`."""


class _Dumper(yaml.SafeDumper):
    """Plain YAML, and functions as lmms-eval names them; an own class, since representers belong to classes."""


_Dumper.add_representer(_Function, lambda dumper, value: dumper.represent_scalar("!function", value, style=""))


def lmms_visual(doc: dict[str, Any]) -> list[Any]:
    """The pictures of an item's question, as lmms-eval asks for them."""
    return [doc["images"][i].convert("RGB") for i in doc["prompt_images"]]


def lmms_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """The text of an item's question as its task asks it, between the harness's `pre_prompt` and `post_prompt`."""
    from mmroute import hub
    from mmroute.tasks.base import Generated

    given = lmms_eval_specific_kwargs or {}
    task = hub.load("tasks", doc["task"])
    if isinstance(task, Generated):
        question = question_text(doc["question"], [Choice(c["label"], c["text"]) for c in doc["choices"]])
    else:
        (message,) = task.messages(lmms_sample(doc))
        question = "\n".join(b["text"] for b in message["content"] if b["type"] == "text")
    return given.get("pre_prompt", "") + question + given.get("post_prompt", "")


def lmms_process(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Accuracy of one item by its task's own rule."""
    from mmroute import hub

    return {"acc": hub.load("tasks", doc["task"]).score(lmms_sample(doc), results[0]).correct or 0.0}


def lmms_sample(doc: dict[str, Any]) -> Sample:
    """The item behind a row; lmms-eval asks for texts and scores on rows without their pictures."""
    used = [*doc["prompt_images"], *(hop[key] for hop in doc["hops"] for key in ("image", "box_image"))]
    images = doc.get("images", [None] * (1 + max(used, default=-1)))
    return sample_of({**doc, "images": images}, str(doc["id"]))


_OTHER_NAMES = {"lmms-eval": "lmms", "vlmevalkit": "vlmeval"}

EXPORTERS: dict[str, Callable[[Iterable[Sample], Path], int]] = {
    "trl": _trl,
    "llava": _llava,
    "sharegpt": _sharegpt,
    "mvot": to_mvot,
    "vlmeval": _vlmeval,
    "lmms": _lmms,
}
