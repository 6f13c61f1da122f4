"""What a hop is: a sentence that names an object and its box, then the image features under that box.

A box is written as `<coor> x1,y1,x2,y2 </coor>`: shares of the picture's width and height as the vision tower sees it
(VolCano's processor pads to a square first). Behind its end the features of all cells that it touches enter the
stream, row by row, as given vision positions of that hop.

Source: VoCoT (NAACL 2025, arXiv 2405.16919), section 3, and its released code for the format and the cells.
Deviates: the release cuts features with rows and columns exchanged; `cells: transposed` does so too, for its
    checkpoint. Boxes are read from what was written, not from data; one that is malformed or empty brings nothing.
    The features enter with the hop that named them; the release ends no hop. Of several images the first is meant.
"""

import math
import re
from typing import Annotated, Literal

from pydantic import Field

from mmroute.config import options
from mmroute.think.base import Box, LookingThinker, Window

__all__ = ["Boxes"]

_NUMBER = r"\s*(\d(?:\.\d+)?)\s*"
_BOX = re.compile(rf"<coor>{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}</coor>$")


class Boxes(LookingThinker):
    """Grounded thoughts: each hop looks again where it points."""

    @options
    class Config:
        cells: Literal["box", "transposed"] = "box"
        """Where a box lies in the grid of features: `transposed` exchanges rows and columns, as the released VolCano
        learned it."""
        max_new_tokens: Annotated[int, Field(ge=1)] = 512
        """Longest chain, answer included; inserted features do not count."""
        instruction: str = (
            "Answer the question and include the reasoning proess. Locate key objects and provide bounding boxes in "
            "your thoughts."
        )
        """Appended to a free question; the release's own words, its spelling too, since VolCano was trained on them."""

    style = "cot"
    config: Config

    def box_at(self, text: str) -> Box | None:
        """The box that a text ends with; None where it ends with none, or with one that holds nothing.

        Example:
            >>> Boxes().box_at("The red ball <coor> 0.10,0.25,0.50,0.75 </coor>")
            (0.1, 0.25, 0.5, 0.75)
        """
        found = _BOX.search(text)
        if found is None:
            return None
        left, upper, right, lower = (min(float(number), 1.0) for number in found.groups())
        return (left, upper, right, lower) if left < right and upper < lower else None

    def window(self, box: Box, rows: int, columns: int) -> Window:
        """First row and column, rows and columns of the cells that a box touches, in a grid of features.

        Example:
            >>> Boxes().window((0.1, 0.25, 0.5, 0.75), 4, 4)
            (1, 0, 2, 2)
            >>> Boxes(cells="transposed").window((0.1, 0.25, 0.5, 0.75), 4, 4)
            (0, 1, 2, 2)
        """
        left, upper, right, lower = box
        if self.config.cells == "transposed":
            left, upper, right, lower = upper, left, lower, right
        # Shares are written with few digits: 0.29 * 100 is 28.999999999999996 and would touch one cell more.
        top, first = math.floor(upper * rows + 1e-6), math.floor(left * columns + 1e-6)
        bottom, last = math.ceil(lower * rows - 1e-6), math.ceil(right * columns - 1e-6)
        return top, first, max(bottom - top, 1), max(last - first, 1)
