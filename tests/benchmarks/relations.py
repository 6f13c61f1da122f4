"""Where things stand, and what is there: VSR to AMBER."""

from benchmarks.rows import Case, Files, P, lettered, shard

TWO = ["red", "blue"]
FOUR = ["red", "blue", "green", "grey"]

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
                    shard("test"),
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
                        lettered("What is the color of the cup?", TWO, "A", P(1), category="direct_attributes"),
                        lettered(
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
                            "answer_options": FOUR,
                            "answer": 2,
                            "objects": [{"bbox": [1, 2, 3, 4], "name": "green"}],
                        }
                    ],
                )
            ],
            [
                Files(
                    "EmbSpatialBench.tsv",
                    [lettered("Which object is closest?", FOUR, "C", P(1), category="close", data_source="mp3d")],
                )
            ],
            [
                Files(
                    shard("test"),
                    [
                        {
                            "question_id": "mp3d_0",
                            "question": "Which object is closest?",
                            "relation": "close",
                            "data_source": "mp3d",
                            "image": P(1),
                            "answer_options": FOUR,
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
                    shard("test", "data/"),
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
                    "testdev_balanced_instructions/" + shard("testdev"),
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
                    "testdev_balanced_images/" + shard("testdev"),
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
                    shard("test", "data/"),
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
}
