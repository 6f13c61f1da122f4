"""Lettered choices and science: MMBench, SEED-Bench, CLEVR, M3CoT, ScienceQA."""

from benchmarks.rows import Case, Files, P, lettered, shard

TWO = ["red", "blue"]
FOUR = ["red", "blue", "green", "grey"]

CASES: dict[str, Case] = {
    "mmbench": Case(
        "dev",
        [
            [
                Files(
                    "MMBench_DEV_EN_legacy.tsv",
                    [
                        lettered("Which is hot?", TWO, "B", P(1), hint="It is summer.", category="physics"),
                        lettered("Which is it?", FOUR, "D", P(2), index=1, hint="nan", category="identity"),
                    ],
                )
            ],
            [
                Files(
                    "en/" + shard("dev"),
                    [
                        {
                            **lettered("Which is hot?", TWO, "B", P(1), hint="It is summer.", category="physics"),
                            "C": "nan",
                            "D": "nan",
                        },
                        lettered("Which is it?", FOUR, "D", P(2), index=1, hint="nan", category="identity"),
                    ],
                )
            ],
        ],
    ),
    "seedbench": Case(
        "test",
        [
            [Files("SEEDBench_IMG.tsv", [lettered("How many?", FOUR, "C", P(1), category="5")])],
            [
                Files(
                    shard("test"),
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
                    shard("test"),
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
                    "data/" + shard("test"),
                    [
                        {
                            "id": "physical-1",
                            "category": "x",
                            "image_id": "1",
                            "question": "What floats?",
                            "choices": FOUR,
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
                            "choices": TWO,
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
                            "choices": FOUR,
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
                            "choices": TWO,
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
                    "data/" + shard("test"),
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
                    "ScienceQA_TEST.tsv",
                    [
                        lettered(
                            "Which is a mammal?",
                            ["frog", "bear"],
                            "B",
                            P(1),
                            hint="Look at the animals.",
                            category="natural science",
                        ),
                        lettered(
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
}
