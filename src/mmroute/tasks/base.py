"""The contract of a task in one place: what its samples are, what it must say, and what generated worlds add.

A public benchmark subclasses `Task` (those in `hub/` by way of `hub._public.Public`); a world we generate subclasses
`Generated` and fills the abstract methods at its end.
"""

from mmroute.tasks._generated import Generated
from mmroute.tasks._relevance import Relevance, relevant_tokens
from mmroute.tasks._schema import Card, Choice, Hop, Origin, Sample, Score, Spec, State
from mmroute.tasks._task import Task, group_accuracy, group_mean, messages_so_far

__all__ = [
    "Card",
    "Choice",
    "Generated",
    "Hop",
    "Origin",
    "Relevance",
    "Sample",
    "Score",
    "Spec",
    "State",
    "Task",
    "group_accuracy",
    "group_mean",
    "messages_so_far",
    "relevant_tokens",
]
