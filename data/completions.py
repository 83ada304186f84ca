"""Completions parsed into a thought and an answer."""

import itertools
import re
from dataclasses import dataclass

from data.special_tokens import COMPLETION_TAGS

_TAG = re.compile("|".join(re.escape(tag) for tag in COMPLETION_TAGS))
_IN_ORDER = ["<think>", "</think>", "<answer>", "</answer>"]


@dataclass(frozen=True)
class Completion:
    """A parsed completion, <think>thought</think><answer>answer</answer>.

    `thought` and `answer` are "" unless it is well formed.
    """

    thought: str
    answer: str
    well_formed: bool


def parse_completion(text: str) -> Completion:
    """Parses a completion strictly, in time linear in its length.

    It is well formed if it is one <think> block and then one <answer> block, without tags inside a
    block and with nothing but white space around the two: its tags are these four, in this order.
    """
    tags = list(itertools.islice(_TAG.finditer(text), len(_IN_ORDER) + 1))
    if [tag[0] for tag in tags] == _IN_ORDER:
        starts = [tag.start() for tag in tags] + [len(text)]
        ends = [0] + [tag.end() for tag in tags]
        before, thought, between, answer, after = (
            text[end:start].strip() for end, start in zip(ends, starts, strict=True)
        )
        if not (before or between or after):
            return Completion(thought, answer, True)
    return Completion("", "", False)
