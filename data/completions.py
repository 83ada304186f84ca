"""Completions parsed into a thought and an answer."""

import re
from dataclasses import dataclass

from data.special_tokens import COMPLETION_TAGS

_COMPLETION = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", flags=re.DOTALL)
_TAG = re.compile("|".join(re.escape(tag) for tag in COMPLETION_TAGS))


@dataclass(frozen=True)
class Completion:
    """A parsed completion, <think>thought</think><answer>answer</answer>.

    `thought` and `answer` are "" unless it is well formed.
    """

    thought: str
    answer: str
    well_formed: bool


def parse_completion(text: str) -> Completion:
    """Parses a completion strictly.

    It is well formed if it is one <think> block and then one <answer> block, without tags inside a
    block and with nothing but white space around the two.
    """
    match = _COMPLETION.fullmatch(text)
    if match is None or any(_TAG.search(block) for block in match.groups()):
        return Completion("", "", False)
    return Completion(match[1].strip(), match[2].strip(), True)
