"""Rule rewards on a finished completion (DeepSeek-R1, arXiv 2501.12948, section 2.2.2).

They say whether it is in the format, and whether its answer is right. There is one parser,
`data.completions.parse_completion`, and it is strict: one thought, one answer, nothing else. What
it does not accept earns nothing, so an answer inside the thought, a second answer block or a nested
tag cannot be paid for by accident.
"""

import re
from decimal import Decimal

from data.completions import parse_completion

# ASCII digits, with an optional sign, thousands in groups of three, and decimals. No exponents,
# units, fractions or expressions: those compare as text.
_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+)(?:\.[0-9]+)?|\.[0-9]+)")
# An answer this much longer than the right one, in characters, is wrong unread: no way to write a
# number or a text needs so many more, and a completion must not be paid for filling its box.
LONGER_BY = 100


def format_reward(text: str) -> float:
    """Returns 1 if the completion is exactly `<think>...</think><answer>...</answer>`, else 0.

    What stands inside does not matter.
    """
    return float(parse_completion(text).well_formed)


def answer_reward(text: str, answer: str) -> float:
    """Returns 1 if the completion is well formed and its answer is the right one, else 0.

    Answers are equal if `normalise` makes the same of them. An empty answer is never right, nor one
    that is longer than the right one by more than `LONGER_BY` characters.

    Args:
      text: the completion alone: without its prompt and the end of sequence, with its four tags.
      answer: the right answer of the problem.
    """
    found = parse_completion(text).answer  # "" unless well formed
    if not found or len(found) > len(answer) + LONGER_BY:
        return 0.0
    return float(normalise(found) == normalise(answer))


def normalise(answer: str) -> Decimal | str:
    """Returns what an answer is compared by.

    A number compares by its value ("09", "9.0" and "+9" are 9, "1,000" is 1000), anything else by
    its text, with each stretch of whitespace as one space. It is strict beyond that: "9 apples", "x
    = 9", "9." and "1e3" are texts, and texts compare with case.
    """
    words = " ".join(answer.split())
    # Decimal keeps as many digits as there are; a float would call 2**53 and 2**53 + 1 equal.
    return Decimal(words.replace(",", "")) if _NUMBER.fullmatch(words) else words
