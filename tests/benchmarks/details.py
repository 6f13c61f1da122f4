"""Small differences and high resolution: MMVP to MMStar."""

from benchmarks.rows import Case, Files, P, lettered, shard

TWO = ["red", "blue"]
FOUR = ["red", "blue", "green", "grey"]

CASES: dict[str, Case] = {
    "mmvp": Case(
        "test",
        [
            [
                Files(
                    "MMVP.tsv",
                    [
                        lettered(f"Is the butterfly {n}?", ["Open", "Closed"], "AB"[i % 2], P(i), index=i + 1)
                        for i, n in enumerate("aabb")
                    ],
                )
            ],
            [
                Files(
                    shard("test"),
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
            [Files("SEEDBench2_Plus.tsv", [lettered("Which bar?", FOUR, "D", P(1), category="chart")])],
            [
                Files(
                    shard("test"),
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
                    "data/" + shard("image"),
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
                        lettered(
                            "What does it say?",
                            [*FOUR[c:], *FOUR[:c]],
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
                    shard("hrbench_4k"),
                    [
                        lettered(
                            "What does it say?",
                            [*FOUR[c:], *FOUR[:c]],
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
                        lettered("How many are blue?", FOUR, "A", P(1), category="Counting"),
                        lettered("Which is alike?", TWO, "B", [P(2), P(3)], index=1, category="Visual_Similarity"),
                    ],
                )
            ],
            [
                Files(
                    "Counting/" + shard("val"),
                    [
                        {
                            "idx": "val_Counting_1",
                            "sub_task": "Counting",
                            "question": "How many are blue?",
                            "choices": FOUR,
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
                    "Visual_Similarity/" + shard("val"),
                    [
                        {
                            "idx": "val_Visual_Similarity_1",
                            "sub_task": "Visual_Similarity",
                            "question": "Which is alike?",
                            "choices": TWO,
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
                        lettered(
                            "Which is shown?",
                            FOUR,
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
                    "mmstar/" + shard("val"),
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
}
