"""VSR: does a caption state the spatial relation of two things rightly?

Source: Visual Spatial Reasoning (arXiv 2205.00363), zero-shot split; the prompt `vocot` is VoCoT's (arXiv 2405.16919).
Deviates: what cannot be parsed is wrong; the rule `vocot` counts it as no, as VoCoT does.
"""

from typing import ClassVar

from mmroute.tasks import _parse
from mmroute.tasks.base import Card, Sample
from mmroute.tasks.hub._fields import first, is_yes, option_texts, pictures
from mmroute.tasks.hub._public import YES_NO_PROMPT, Public
from mmroute.tasks.hub._readers import HubRows, JsonlWithImages, Row, Tsv

__all__ = ["VSR"]


_COCO = "(train2017 and val2017 of COCO: cocodataset.org/#download)"


def _vocot(sample: Sample, completion: str) -> _parse.Verdict:
    prediction = _parse.yes_no(completion)
    return _parse.Verdict((prediction or "no") == sample.answer, prediction or "no")


class VSR(Public):
    """True or false, by relation."""

    name = "vsr"
    card: ClassVar[Card] = Card(
        ("cambridgeltl/vsr_zeroshot",),
        {"test": 1222, "dev": 340, "train": 3489},
        "CC-BY-4.0",
        "generate",
        "accuracy",
        0.5,
    )
    sources = (
        JsonlWithImages("{split}.jsonl", fetch=_COCO),
        Tsv("VSR-zeroshot", splits=("test",)),
        HubRows("cambridgeltl/vsr_zeroshot"),
    )
    prompts: ClassVar = {
        "short": lambda s: f"{s.question} {YES_NO_PROMPT}",
        "vocot": lambda s: f'Is there an event "{s.meta["caption"].lower()}" taking place in the image?',
    }
    scorers: ClassVar = {"vocot": _vocot}
    categories = ("relation",)

    def sample(self, row: Row, split: str, number: int) -> Sample:
        caption = first(row, "caption", "question").removeprefix("Is the statement true? ")
        label = first(row, "label", "answer")
        if options := option_texts(row):  # the table asks for a letter
            label = options["ABCDEF".index(str(label))]
        return self.yes_no(
            split,
            number,
            question=f'Is this true of the image: "{caption}"',
            images=pictures(row, "image"),
            yes=is_yes(label),
            caption=caption,
            relation=first(row, "relation", "category", default="unknown"),
        )
