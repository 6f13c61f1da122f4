"""HallusionBench: the same question about a figure and about an edited copy of it.

Source: HallusionBench (arXiv 2310.14566): aAcc over questions, fAcc over figures, qAcc over a question's figures.
Deviates: its GPT judge becomes the rule `strict`.
"""

from collections.abc import Sequence
from typing import ClassVar

from mmroute.tasks.base import Card, Sample, Score, group_accuracy
from mmroute.tasks.hub._fields import first, is_yes, pictures
from mmroute.tasks.hub._public import YES_NO_PROMPT, Public
from mmroute.tasks.hub._readers import HubRows, JsonlWithImages, Row, SplitColumn, Tsv

__all__ = ["Hallusion"]

# 0: no figure is shown; 1: the figure; 2: an edited copy of it.
_SHOWS = SplitColumn("visual_input", {"image": ("1", "2"), "non_image": ("0",)})


class Hallusion(Public):
    """Accuracy of answers, of figures and of questions."""

    name = "hallusion"
    card: ClassVar[Card] = Card(
        ("lmms-lab/HallusionBench", "lmms-lab-encoder/HallusionBench"),
        {"image": 951, "non_image": 178},
        "BSD-3-Clause",
        "generate",
        "qAcc",
        0.5,
    )
    sources = (
        Tsv("HallusionBench", splits=("image",)),
        HubRows("lmms-lab/HallusionBench"),
        JsonlWithImages("HallusionBench.json", columns=("filename",), by=_SHOWS),
    )
    prompts: ClassVar = {"yes_no": lambda s: f"{s.question}\n{YES_NO_PROMPT}"}

    def sample(self, row: Row, split: str, number: int) -> Sample:
        place = [str(row.get(key, "")) for key in ("category", "subcategory", "set_id", "figure_id", "question_id")]
        if "l2-category" in row:  # the table packs them into its index: subcategory_set_figure_question
            *_, one, two, three = f"{row.get('index')}___".rstrip("_").split("_")
            place = [str(row["category"]), str(row["l2-category"]), one, two, three]
        figure, question = "/".join(place[:4]), "/".join([*place[:3], place[4]])
        return self.yes_no(
            split,
            number,
            question=first(row, "question"),
            images=pictures(row, "image") or pictures(row, "filename"),
            yes=is_yes(first(row, "gt_answer", "answer")),
            group=figure,
            category=place[0],
            asked=question,
        )

    def metrics(self, samples: Sequence[Sample], scores: Sequence[Score]) -> dict[str, float]:
        right = [s.correct or 0.0 for s in scores]
        out = super().metrics(samples, scores)
        return out | {
            "aAcc": out["accuracy"],
            "fAcc": group_accuracy([s.group for s in samples], right),
            "qAcc": group_accuracy([s.meta["asked"] for s in samples], right),
        }
