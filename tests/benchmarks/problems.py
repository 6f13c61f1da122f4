"""Mathematics, many subjects at once, and reasoning to train on: MathVista to OneThinker."""

from benchmarks.rows import Case, Files, P, lettered, shard

TWO = ["red", "blue"]

CASES: dict[str, Case] = {
    "mathvista": Case(
        "testmini",
        [
            [
                Files(
                    "data/" + shard("testmini"),
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
                            "choices": TWO,
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
                    "data/" + shard("test"),
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
                            "options": TWO,
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
                    "Accounting/" + shard("validation"),
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
                    "Math/" + shard("validation"),
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
                        lettered(
                            "<image 1> What is shown in <image 2>?",
                            TWO,
                            "B",
                            [P(1), P(2)],
                            category="Accounting",
                            split="validation",
                        ),
                        lettered(
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
                    shard("train"),
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
