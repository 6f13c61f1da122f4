"""Made rows of every public benchmark, in each format its rows come in: the real columns and types, invented content.

A row holds `P(i)` where a picture belongs; the writers turn it into base64, an embedded struct, or a file.
"""

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from made import picture

Rows = list[dict[str, Any]]


class P(NamedTuple):
    """The picture with this number."""

    number: int


class Files(NamedTuple):
    """Rows, and the file below the benchmark's folder that they are written to."""

    file: str
    rows: Rows
    images: str = ""
    """Folder of the pictures, for JSON."""
    named: str = "{}.jpg"


class Case(NamedTuple):
    split: str
    sources: list[list[Files]]
    """One entry per format; a format may need several files."""


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def _encoded(value: Any) -> Any:
    if isinstance(value, P):
        return base64.b64encode(png(value.number)).decode()
    if isinstance(value, list) and value and isinstance(value[0], P):
        return json.dumps([_encoded(v) for v in value])
    return value


def _struct(value: Any) -> Any:
    return {"bytes": png(value.number), "path": f"{value.number}.png"} if isinstance(value, P) else value


def write(root: Path, files: Files) -> None:
    """One file in the format of its name."""
    path = root / files.file
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tsv":
        with path.open("w", newline="", encoding="utf-8") as out:
            table = csv.DictWriter(out, list(files.rows[0]), delimiter="\t")
            table.writeheader()
            table.writerows([{k: _encoded(v) for k, v in row.items()} for row in files.rows])
    elif path.suffix == ".parquet":
        _write_parquet(path, files.rows)
    else:
        rows = [{k: _stored(root, files, v) for k, v in row.items()} for row in files.rows]
        is_list = path.suffix == ".json"
        path.write_text(json.dumps(rows) if is_list else "\n".join(json.dumps(r) for r in rows) + "\n")


def _stored(root: Path, files: Files, value: Any) -> Any:
    if not isinstance(value, P):
        return value
    if not files.images:
        return _encoded(value)
    name = files.named.format(f"{value.number:012d}")
    path = root / files.images / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value.number))
    return name


def _write_parquet(path: Path, rows: Rows) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictured = [k for k in rows[0] if any(isinstance(row[k], P) for row in rows)]
    table = pa.Table.from_pylist([{k: _struct(v) for k, v in row.items()} for row in rows])
    features = {k: {"_type": "Image"} if k in pictured else {"dtype": "string", "_type": "Value"} for k in rows[0]}
    info = {"info": {"features": features}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)


def place(root: Path, name: str, which: int) -> None:
    """Writes one format of a benchmark below a data root."""
    for files in CASES[name].sources[which]:
        write(root / name, files)


def _shard(split: str, folder: str = "") -> str:
    return f"{folder}{split}-00000-of-00001.parquet"


def _lettered(question: str, options: list[str], answer: str, image: Any, **more: Any) -> dict[str, Any]:
    """A row of VLMEvalKit's multiple-choice tables."""
    letters = {letter: options[i] if i < len(options) else "" for i, letter in enumerate("ABCD")}
    return {"index": more.pop("index", 0), "image": image, "question": question, **letters, "answer": answer, **more}


_TWO = ["red", "blue"]
_FOUR = ["red", "blue", "green", "grey"]

CASES: dict[str, Case] = {
    "vsr": Case(
        "test",
        [
            [
                Files(
                    "test.jsonl",
                    [
                        {
                            "image": P(1),
                            "image_link": "http://images.cocodataset.org/train2017/000000000001.jpg",
                            "caption": "The Cat is left of the dog.",
                            "label": 1,
                            "relation": "left of",
                        },
                        {
                            "image": P(2),
                            "image_link": "http://images.cocodataset.org/val2017/000000000002.jpg",
                            "caption": "The cup is under the table.",
                            "label": 0,
                            "relation": "under",
                        },
                    ],
                    "images",
                )
            ],
            [
                Files(
                    "VSR-zeroshot.tsv",
                    [
                        {
                            "index": 0,
                            "image": P(1),
                            "question": "The Cat is left of the dog.",
                            "answer": "Yes",
                            "category": "left of",
                        },
                        {
                            "index": 1,
                            "image": P(2),
                            "question": "The cup is under the table.",
                            "answer": "No",
                            "category": "under",
                        },
                    ],
                )
            ],
        ],
    ),
    "vstar": Case(
        "test",
        [
            [
                Files(
                    _shard("test"),
                    [
                        {
                            "image": P(1),
                            "text": "What is the color of the cup?\n(A) red\n(B) blue\n"
                            "Answer with the option's letter from the given choices directly.",
                            "category": "direct_attributes",
                            "label": "A",
                            "question_id": "0",
                        },
                        {
                            "image": P(2),
                            "text": "Is the dog left or right of the cat?\n(A) left\n(B) right\n"
                            "Answer with the option's letter from the given choices directly.",
                            "category": "relative_position",
                            "label": "B",
                            "question_id": "1",
                        },
                    ],
                )
            ],
            [
                Files(
                    "VStarBench.tsv",
                    [
                        _lettered("What is the color of the cup?", _TWO, "A", P(1), category="direct_attributes"),
                        _lettered(
                            "Is the dog left or right of the cat?",
                            ["left", "right"],
                            "B",
                            P(2),
                            index=1,
                            category="relative_position",
                        ),
                    ],
                )
            ],
        ],
    ),
    "embspatial": Case(
        "test",
        [
            [
                Files(
                    "embspatial_bench.json",
                    [
                        {
                            "question_id": "mp3d_0",
                            "question": "Which object is closest?",
                            "relation": "close",
                            "data_source": "mp3d",
                            "image": P(1),
                            "answer_options": _FOUR,
                            "answer": 2,
                            "objects": [{"bbox": [1, 2, 3, 4], "name": "green"}],
                        }
                    ],
                )
            ],
            [
                Files(
                    "EmbSpatialBench.tsv",
                    [_lettered("Which object is closest?", _FOUR, "C", P(1), category="close", data_source="mp3d")],
                )
            ],
            [
                Files(
                    _shard("test"),
                    [
                        {
                            "question_id": "mp3d_0",
                            "question": "Which object is closest?",
                            "relation": "close",
                            "data_source": "mp3d",
                            "image": P(1),
                            "answer_options": _FOUR,
                            "answer": 2,
                            "objects": [{"bbox": [1, 2, 3, 4], "name": "green"}],
                        }
                    ],
                )
            ],
        ],
    ),
    "winoground": Case(
        "test",
        [
            [
                Files(
                    _shard("test", "data/"),
                    [
                        {
                            "id": i,
                            "image_0": P(2 * i),
                            "image_1": P(2 * i + 1),
                            "caption_0": f"old kisses young {i}",
                            "caption_1": f"young kisses old {i}",
                            "tag": "Adjective",
                            "secondary_tag": "",
                            "num_main_preds": 1,
                            "collapsed_tag": "Object",
                        }
                        for i in range(2)
                    ],
                )
            ],
            [
                Files(
                    "examples.jsonl",
                    [
                        {
                            "id": i,
                            "image_0": P(2 * i),
                            "image_1": P(2 * i + 1),
                            "caption_0": f"old kisses young {i}",
                            "caption_1": f"young kisses old {i}",
                            "collapsed_tag": "Object",
                        }
                        for i in range(2)
                    ],
                    "images",
                )
            ],
        ],
    ),
    "gqa": Case(
        "testdev",
        [
            [
                Files(
                    "testdev_balanced_instructions/" + _shard("testdev"),
                    [
                        {
                            "id": "201307251",
                            "imageId": "n161313",
                            "question": "Is it overcast?",
                            "answer": "no",
                            "fullAnswer": "No, it is clear.",
                            "isBalanced": True,
                        },
                        {
                            "id": "201640614",
                            "imageId": "n235859",
                            "question": "Who is wearing the shirt?",
                            "answer": "girl",
                            "fullAnswer": "The girl is wearing a shirt.",
                            "isBalanced": True,
                        },
                        {
                            "id": "201640615",
                            "imageId": "n161313",
                            "question": "What is the sky like?",
                            "answer": "clear",
                            "fullAnswer": "The sky is clear.",
                            "isBalanced": True,
                        },
                    ],
                ),
                Files(
                    "testdev_balanced_images/" + _shard("testdev"),
                    [{"id": "n161313", "image": P(1)}, {"id": "n235859", "image": P(2)}],
                ),
            ],
            [
                Files(
                    "GQA_TestDev_Balanced.tsv",
                    [
                        {"index": 10_000_000, "image": P(1), "question": "Is it overcast?", "answer": "no"},
                        {"index": 10_000_001, "image": P(2), "question": "Who is wearing the shirt?", "answer": "girl"},
                        # a picture that was there already is named by the row that has it
                        {
                            "index": 10_000_002,
                            "image": 10_000_000,
                            "question": "What is the sky like?",
                            "answer": "clear",
                        },
                    ],
                )
            ],
        ],
    ),
    "pope": Case(
        "test",
        [
            [
                Files(
                    _shard("test", "data/"),
                    [
                        {
                            "id": str(i),
                            "question_id": str(i),
                            "question": f"Is there a {what} in the image?",
                            "answer": answer,
                            "image_source": "COCO_val2014_1",
                            "image": P(i),
                            "category": category,
                        }
                        for i, (what, answer, category) in enumerate(
                            [("dog", "yes", "adversarial"), ("car", "no", "popular")]
                        )
                    ],
                )
            ],
            [
                Files(
                    "POPE.tsv",
                    [
                        {
                            "index": i,
                            "image": P(i),
                            "question": f"Is there a {what} in the image?",
                            "answer": answer,
                            "category": category,
                        }
                        for i, (what, answer, category) in enumerate(
                            [("dog", "Yes", "adversarial"), ("car", "No", "popular")]
                        )
                    ],
                )
            ],
            [
                Files(
                    "coco_pope_adversarial.json",
                    [
                        {"question_id": i, "image": P(i), "text": f"Is there a {what} in the image?", "label": answer}
                        for i, (what, answer) in enumerate([("dog", "yes"), ("car", "no")])
                    ],
                    "images",
                )
            ],
        ],
    ),
    "amber": Case(
        "test",
        [
            [
                Files(
                    "discriminative.jsonl",
                    [
                        {
                            "id": 1005,
                            "image": P(1),
                            "query": "Is the sky sunny in this image?",
                            "truth": "yes",
                            "type": "discriminative-attribute-state",
                        },
                        {
                            "id": 1006,
                            "image": P(1),
                            "query": "Is there a dog in this image?",
                            "truth": "no",
                            "type": "discriminative-hallucination",
                        },
                    ],
                    "image",
                    "AMBER_{}.jpg",
                )
            ],
            [
                Files(
                    "AMBER.tsv",
                    [
                        {
                            "index": 0,
                            "image": P(1),
                            "question": "Is the sky sunny in this image?",
                            "answer": "yes",
                            "category": "attribute-state",
                        },
                        {
                            "index": 1,
                            "image": 0,
                            "question": "Is there a dog in this image?",
                            "answer": "no",
                            "category": "hallucination",
                        },
                    ],
                )
            ],
        ],
    ),
    "mmbench": Case(
        "dev",
        [
            [
                Files(
                    "MMBench_DEV_EN_legacy.tsv",
                    [
                        _lettered("Which is hot?", _TWO, "B", P(1), hint="It is summer.", category="physics"),
                        _lettered("Which is it?", _FOUR, "D", P(2), index=1, hint="nan", category="identity"),
                    ],
                )
            ],
            [
                Files(
                    "en/" + _shard("dev"),
                    [
                        {
                            **_lettered("Which is hot?", _TWO, "B", P(1), hint="It is summer.", category="physics"),
                            "C": "nan",
                            "D": "nan",
                        },
                        _lettered("Which is it?", _FOUR, "D", P(2), index=1, hint="nan", category="identity"),
                    ],
                )
            ],
        ],
    ),
    "seedbench": Case(
        "test",
        [
            [Files("SEEDBench_IMG.tsv", [_lettered("How many?", _FOUR, "C", P(1), category="5")])],
            [
                Files(
                    _shard("test"),
                    [
                        {
                            "question": "How many?",
                            "choice_a": "red",
                            "choice_b": "blue",
                            "choice_c": "green",
                            "choice_d": "grey",
                            "answer": "C",
                            "data_id": "1454426_2591111986",
                            "data_type": "image",
                            "question_id": "101669",
                            "question_type_id": 5,
                            "image": P(1),
                        }
                    ],
                )
            ],
            [
                Files(
                    "SEED-Bench-image.jsonl",
                    [
                        {
                            "question": "How many?",
                            "choice_a": "red",
                            "choice_b": "blue",
                            "choice_c": "green",
                            "choice_d": "grey",
                            "answer": "C",
                            "data_id": P(1),
                            "data_type": "image",
                            "question_type_id": 5,
                        }
                    ],
                    "SEED-Bench-image",
                    "{}",
                )
            ],
        ],
    ),
    "clevr4": Case(
        "test",
        [
            [
                Files(
                    "clevr_test.jsonl",
                    [
                        {
                            "image": P(1),
                            "question": "Is there a red cube?",
                            "options": ["yes", "no"],
                            "answer": 1,
                            "type": "exist",
                        },
                        {
                            "image": P(2),
                            "question": "How many cubes?",
                            "options": ["1", "2", "3", "4"],
                            "answer": 2,
                            "type": "count",
                        },
                    ],
                    "images",
                    "CLEVR_val_{}.png",
                )
            ],
            [
                Files(
                    _shard("test"),
                    [
                        {
                            "image": P(1),
                            "question": "Is there a red cube?",
                            "options": ["yes", "no"],
                            "answer": 1,
                            "type": "exist",
                        },
                        {
                            "image": P(2),
                            "question": "How many cubes?",
                            "options": ["1", "2", "3", "4"],
                            "answer": 2,
                            "type": "count",
                        },
                    ],
                )
            ],
        ],
    ),
    "m3cot": Case(
        "test",
        [
            [
                Files(
                    "data/" + _shard("test"),
                    [
                        {
                            "id": "physical-1",
                            "category": "x",
                            "image_id": "1",
                            "question": "What floats?",
                            "choices": _FOUR,
                            "context": "A lake.",
                            "answer": "B",
                            "rationale": "Blue is light. So it floats.",
                            "split": "test",
                            "image": P(1),
                            "domain": "science",
                            "topic": "physics",
                        },
                        {
                            "id": "math-2",
                            "category": "x",
                            "image_id": "2",
                            "question": "What is next?",
                            "choices": _TWO,
                            "context": "",
                            "answer": "A",
                            "rationale": "",
                            "split": "test",
                            "image": None,
                            "domain": "mathematics",
                            "topic": "algebra",
                        },
                    ],
                )
            ],
            [
                Files(
                    "test.jsonl",
                    [
                        {
                            "id": "physical-1",
                            "question": "What floats?",
                            "choices": _FOUR,
                            "context": "A lake.",
                            "answer": "B",
                            "rationale": "Blue is light. So it floats.",
                            "image": P(1),
                            "domain": "science",
                            "topic": "physics",
                        },
                        {
                            "id": "math-2",
                            "question": "What is next?",
                            "choices": _TWO,
                            "context": "",
                            "answer": "A",
                            "rationale": "",
                            "image": None,
                            "domain": "mathematics",
                            "topic": "algebra",
                        },
                    ],
                    "images",
                    "{}.png",
                )
            ],
        ],
    ),
    "scienceqa": Case(
        "test",
        [
            [
                Files(
                    "data/" + _shard("test"),
                    [
                        {
                            "image": P(1),
                            "question": "Which is a mammal?",
                            "choices": ["frog", "bear"],
                            "answer": 1,
                            "hint": "Look at the animals.",
                            "task": "closed choice",
                            "grade": "grade2",
                            "subject": "natural science",
                            "topic": "biology",
                            "category": "x",
                            "skill": "x",
                            "lecture": "Mammals have fur. Frogs have none.",
                            "solution": "The bear has fur.",
                        },
                        {
                            "image": None,
                            "question": "Which word rhymes?",
                            "choices": ["can", "cup", "man"],
                            "answer": 2,
                            "hint": "",
                            "task": "closed choice",
                            "grade": "grade1",
                            "subject": "language science",
                            "topic": "phonology",
                            "category": "x",
                            "skill": "x",
                            "lecture": "",
                            "solution": "",
                        },
                    ],
                )
            ],
            [
                Files(
                    "ScienceQA_test.tsv",
                    [
                        _lettered(
                            "Which is a mammal?",
                            ["frog", "bear"],
                            "B",
                            P(1),
                            hint="Look at the animals.",
                            category="natural science",
                        ),
                        _lettered(
                            "Which word rhymes?",
                            ["can", "cup", "man"],
                            "C",
                            "",
                            index=1,
                            hint="",
                            category="language science",
                        ),
                    ],
                )
            ],
        ],
    ),
    "mmvp": Case(
        "test",
        [
            [
                Files(
                    "MMVP.tsv",
                    [
                        _lettered(f"Is the butterfly {n}?", ["Open", "Closed"], "AB"[i % 2], P(i), index=i + 1)
                        for i, n in enumerate("aabb")
                    ],
                )
            ],
            [
                Files(
                    _shard("test"),
                    [
                        {
                            "Index": i + 1,
                            "Question": f"Is the butterfly {n}?",
                            "Options": "(a) Open (b) Closed",
                            "Correct Answer": ["(a)", "(b)"][i % 2],
                            "image": P(i),
                        }
                        for i, n in enumerate("aabb")
                    ],
                )
            ],
            [
                Files(
                    "Questions.jsonl",
                    [
                        {
                            "Index": i + 1,
                            "Question": f"Is the butterfly {n}?",
                            "Options": "(a) Open (b) Closed",
                            "Correct Answer": ["(a)", "(b)"][i % 2],
                            "image": P(i),
                        }
                        for i, n in enumerate("aabb")
                    ],
                    "MMVP Images",
                    "{}.jpg",
                )
            ],
        ],
    ),
    "seedbench2plus": Case(
        "test",
        [
            [Files("SEEDBench2_Plus.tsv", [_lettered("Which bar?", _FOUR, "D", P(1), category="chart")])],
            [
                Files(
                    _shard("test"),
                    [
                        {
                            "question": "Which bar?",
                            "choice_A": "red",
                            "choice_B": "blue",
                            "choice_C": "green",
                            "choice_D": "grey",
                            "answer": "D",
                            "data_id": "chart/1.png",
                            "question_id": "1",
                            "question_image_type": "Chart",
                            "question_image_subtype": "chart",
                            "image": P(1),
                        }
                    ],
                )
            ],
        ],
    ),
    "hallusion": Case(
        "image",
        [
            [
                Files(
                    "data/" + _shard("image"),
                    [
                        {
                            "category": "VS",
                            "subcategory": "chart",
                            "visual_input": "1",
                            "set_id": "3",
                            "figure_id": str(f),
                            "sample_note": "x",
                            "question_id": str(q),
                            "question": f"Is {q} true?",
                            "gt_answer_details": "x",
                            "gt_answer": str(int(f == q)),
                            "filename": "./x.png",
                            "image": P(f),
                        }
                        for f in (0, 1)
                        for q in (0, 1)
                    ],
                )
            ],
            [
                Files(
                    "HallusionBench.tsv",
                    [
                        {
                            "index": f"chart_3_{f}_{q}",
                            "category": "VS",
                            "l2-category": "chart",
                            "image": P(f),
                            "question": f"Is {q} true?",
                            "answer": "Yes" if f == q else "No",
                        }
                        for f in (0, 1)
                        for q in (0, 1)
                    ],
                )
            ],
        ],
    ),
    "hrbench": Case(
        "hrbench_4k",
        [
            [
                Files(
                    "HRBench4K.tsv",
                    [
                        _lettered(
                            "What does it say?",
                            [*_FOUR[c:], *_FOUR[:c]],
                            "ABCD"[-c % 4],
                            P(1),
                            index=c,
                            category="single",
                            cycle_category=c,
                        )
                        for c in range(4)
                    ],
                )
            ],
            [
                Files(
                    _shard("hrbench_4k"),
                    [
                        _lettered(
                            "What does it say?",
                            [*_FOUR[c:], *_FOUR[:c]],
                            "ABCD"[-c % 4],
                            P(1),
                            index=c,
                            category="single",
                            cycle_category=str(c),
                        )
                        for c in range(4)
                    ],
                )
            ],
        ],
    ),
    "blink": Case(
        "val",
        [
            [
                Files(
                    "BLINK.tsv",
                    [
                        _lettered("How many are blue?", _FOUR, "A", P(1), category="Counting"),
                        _lettered("Which is alike?", _TWO, "B", [P(2), P(3)], index=1, category="Visual_Similarity"),
                    ],
                )
            ],
            [
                Files(
                    "Counting/" + _shard("val"),
                    [
                        {
                            "idx": "val_Counting_1",
                            "sub_task": "Counting",
                            "question": "How many are blue?",
                            "choices": _FOUR,
                            "answer": "(A)",
                            "prompt": "How many are blue?\n(A) red ..",
                            "image_1": P(1),
                            "image_2": None,
                            "image_3": None,
                            "image_4": None,
                        }
                    ],
                ),
                Files(
                    "Visual_Similarity/" + _shard("val"),
                    [
                        {
                            "idx": "val_Visual_Similarity_1",
                            "sub_task": "Visual_Similarity",
                            "question": "Which is alike?",
                            "choices": _TWO,
                            "answer": "(B)",
                            "prompt": "Which is alike?",
                            "image_1": P(2),
                            "image_2": P(3),
                            "image_3": None,
                            "image_4": None,
                        }
                    ],
                ),
            ],
        ],
    ),
    "mmstar": Case(
        "val",
        [
            [
                Files(
                    "MMStar.tsv",
                    [
                        _lettered(
                            "Which is shown?",
                            _FOUR,
                            "A",
                            P(1),
                            category="coarse perception",
                            **{"l2-category": "image scene and topic"},
                        )
                    ],
                )
            ],
            [
                Files(
                    "mmstar/" + _shard("val"),
                    [
                        {
                            "index": 0,
                            "question": "Which is shown?\nOptions: A: red, B: blue, C: green, D: grey",
                            "image": P(1),
                            "answer": "A",
                            "category": "coarse perception",
                            "l2_category": "image scene and topic",
                            "meta_info": "{}",
                        }
                    ],
                )
            ],
        ],
    ),
    "mathvista": Case(
        "testmini",
        [
            [
                Files(
                    "data/" + _shard("testmini"),
                    [
                        {
                            "pid": "1",
                            "question": "How long is it?",
                            "image": "images/1.jpg",
                            "decoded_image": P(1),
                            "choices": None,
                            "unit": "cm",
                            "precision": 1.0,
                            "answer": "1.2",
                            "question_type": "free_form",
                            "answer_type": "float",
                            "query": "Hint: Give a number with one decimal.\nQuestion: How long?",
                        },
                        {
                            "pid": "2",
                            "question": "Which?",
                            "image": "images/2.jpg",
                            "decoded_image": P(2),
                            "choices": _TWO,
                            "unit": None,
                            "precision": None,
                            "answer": "blue",
                            "question_type": "multi_choice",
                            "answer_type": "text",
                            "query": "",
                        },
                    ],
                )
            ],
            [
                Files(
                    "MathVista_MINI.tsv",
                    [
                        {
                            "index": 1,
                            "question": "How long is it?",
                            "image": P(1),
                            "choices": "",
                            "unit": "cm",
                            "precision": "1.0",
                            "answer": "1.2",
                            "answer_option": "",
                            "question_type": "free_form",
                            "answer_type": "float",
                            "query": "",
                        },
                        {
                            "index": 2,
                            "question": "Which?",
                            "image": P(2),
                            "choices": "['red', 'blue']",
                            "unit": "",
                            "precision": "",
                            "answer": "blue",
                            "answer_option": "B",
                            "question_type": "multi_choice",
                            "answer_type": "text",
                            "query": "",
                        },
                    ],
                )
            ],
        ],
    ),
    "mathvision": Case(
        "test",
        [
            [
                Files(
                    "data/" + _shard("test"),
                    [
                        {
                            "id": "1",
                            "question": "How many?\n<image1>",
                            "options": [],
                            "image": "images/1.jpg",
                            "decoded_image": P(1),
                            "answer": "\\frac{1}{2}",
                            "solution": None,
                            "level": 2,
                            "subject": "combinatorics",
                        },
                        {
                            "id": "2",
                            "question": "Which?",
                            "options": _TWO,
                            "image": "images/2.jpg",
                            "decoded_image": P(2),
                            "answer": "A",
                            "solution": None,
                            "level": 1,
                            "subject": "arithmetic",
                        },
                    ],
                )
            ],
            [
                Files(
                    "MathVision.tsv",
                    [
                        {
                            "index": 1,
                            "question": "How many?\n<image1>",
                            "image": P(1),
                            "choices": "[]",
                            "answer": "\\frac{1}{2}",
                            "category": "combinatorics",
                            "level": 2,
                        },
                        {
                            "index": 2,
                            "question": "Which?",
                            "image": P(2),
                            "choices": "['red', 'blue']",
                            "answer": "A",
                            "category": "arithmetic",
                            "level": 1,
                        },
                    ],
                )
            ],
        ],
    ),
    "mmmath": Case(
        "test",
        [
            [
                Files(
                    "MM_Math.jsonl",
                    [
                        {
                            "question": "Find the angle.",
                            "file_name": P(1),
                            "year": "eight",
                            "difficult": "easy",
                            "solution": "It is a triangle. Thus \\boxed{30^\\circ}.",
                            "knowledge": "triangles",
                        }
                    ],
                    "MM_Math",
                    "{}.png",
                )
            ],
            [
                Files(
                    "MM-Math.tsv",
                    [
                        {
                            "index": 0,
                            "image": P(1),
                            "question": "Find the angle.",
                            "answer": "30^\\circ",
                            "year": "eight",
                            "difficulty": "easy",
                            "knowledge": "triangles",
                        }
                    ],
                )
            ],
        ],
    ),
    "mmmu": Case(
        "validation",
        [
            [
                Files(
                    "Accounting/" + _shard("validation"),
                    [
                        {
                            "id": "validation_Accounting_1",
                            "question": "<image 1> What is shown in <image 2>?",
                            "options": "['red', 'blue']",
                            "explanation": "",
                            "image_1": P(1),
                            "image_2": P(2),
                            **{f"image_{i}": None for i in range(3, 8)},
                            "answer": "B",
                            "question_type": "multiple-choice",
                            "subfield": "x",
                        }
                    ],
                ),
                Files(
                    "Math/" + _shard("validation"),
                    [
                        {
                            "id": "validation_Math_1",
                            "question": "What is x in <image 1>?",
                            "options": "[]",
                            "explanation": "",
                            "image_1": P(3),
                            **{f"image_{i}": None for i in range(2, 8)},
                            "answer": "['8', 'eight']",
                            "question_type": "open",
                            "subfield": "x",
                        }
                    ],
                ),
            ],
            [
                Files(
                    "MMMU_DEV_VAL.tsv",
                    [
                        _lettered(
                            "<image 1> What is shown in <image 2>?",
                            _TWO,
                            "B",
                            [P(1), P(2)],
                            category="Accounting",
                            split="validation",
                        ),
                        _lettered(
                            "What is x in <image 1>?",
                            [],
                            "['8', 'eight']",
                            P(3),
                            index=1,
                            category="Math",
                            split="validation",
                        ),
                    ],
                )
            ],
        ],
    ),
    "onethinker": Case(
        "train",
        [
            [
                Files(
                    "onethinker_sft_image.json",
                    [
                        {
                            "problem": "<image>\nWhich is larger?",
                            "problem_type": "multiple choice",
                            "data_type": "image",
                            "options": ["A. red", "B. blue"],
                            "path": P(1),
                            "solution": "<answer>B</answer>",
                            "process": "<think>Red is small.\n\nBlue is large.</think>",
                        },
                        {
                            "problem": "What is 2 + 3?",
                            "problem_type": "math",
                            "data_type": "image",
                            "options": [],
                            "path": P(2),
                            "solution": "<answer>5</answer>",
                            "process": "<think>2 + 3 = 5.</think>",
                        },
                        {
                            "problem": "What happens?",
                            "problem_type": "open-ended",
                            "data_type": "video",
                            "options": [],
                            "path": "",
                            "solution": "<answer>x</answer>",
                            "process": "",
                        },
                    ],
                    ".",
                    "images/{}.jpg",
                )
            ],
            [
                Files(
                    _shard("train"),
                    [
                        {
                            "problem": "<image>\nWhich is larger?",
                            "problem_type": "multiple choice",
                            "data_type": "image",
                            "options": ["A. red", "B. blue"],
                            "image": P(1),
                            "solution": "<answer>B</answer>",
                            "process": "<think>Red is small.\n\nBlue is large.</think>",
                        },
                        {
                            "problem": "What is 2 + 3?",
                            "problem_type": "math",
                            "data_type": "image",
                            "options": [],
                            "image": P(2),
                            "solution": "<answer>5</answer>",
                            "process": "<think>2 + 3 = 5.</think>",
                        },
                    ],
                )
            ],
        ],
    ),
}
