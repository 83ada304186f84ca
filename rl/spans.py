"""What the parts of a trajectory are for: the spans that tags mark.

A role says who wrote a token, a span what it is for: a thought, an answer, a call of a tool. Spans
are found in the ids as they are, and nothing is tokenised again: a tag may be one id or the
characters of several, and a token with any character of a tag belongs to it.
"""

import bisect
import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from rl.halting import Text
from rl.trajectory import Role, Trajectory

Tags = Mapping[str, tuple[str, str]]

# Name of a span -> what opens and what closes it.
TAGS: Tags = {
    "thought": ("<think>", "</think>"),
    "answer": ("<answer>", "</answer>"),
    "tool_call": ("<tool_call>", "</tool_call>"),
}
BLOCK = 256  # tokens that are decoded at a time


def spans_of(
    trajectory: Trajectory, tokenizer: Text, tags: Tags = TAGS
) -> dict[str, tuple[tuple[int, int], ...]]:
    """Returns name -> the spans of that name in order, each [start, end) in tokens, tags included.

    What a prompt or a tool says has no spans. Each turn of the policy, with what was put into its
    mouth, is read by itself:

    - A tag at the very end of what it read opens a span with its first token, as templates do that
      end a prompt with <think>.
    - A span that is not closed goes to the end of the turn. One inside another ends with that.
    - A tag that opens a span which is open, or closes one which is not, is text. There may be any
      number of spans of a name.

    Args:
      tokenizer: decodes ids.
      tags: name -> (what opens a span, what closes it); texts without characters of several bytes.
    """
    written_T = ~np.isin(trajectory.roles_T, (Role.PROMPT, Role.TOOL))
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in tags}
    for start, end in _runs(written_T):
        read = trajectory.tokens_T[max(start - _longest(tags), 0) : start]
        before = _decode(tokenizer, read).rstrip()
        opened = [(name, start) for name, (tag, _) in tags.items() if before.endswith(tag)]
        for tag, first, last in _find_tags(trajectory.tokens_T[start:end], tokenizer, tags):
            name = next(name for name, pair in tags.items() if tag in pair)
            is_open = [each for each, _ in opened]
            if tag == tags[name][0]:
                if name not in is_open:
                    opened.append((name, start + first))
                continue
            while name in is_open:
                inner, begun = opened.pop()
                is_open.pop()
                found[inner].append((begun, start + (last if inner == name else first)))
                if inner == name:
                    break
        for name, begun in opened:
            found[name].append((begun, end))
    return {name: tuple(sorted(spans)) for name, spans in found.items() if spans}


def parts_of(trajectory: Trajectory) -> list[tuple[str, int, int]]:
    """Cuts a trajectory into parts, each (what it is, start, end) in tokens, in order.

    What it is: the name of the innermost span, or "model" outside of any, for what the policy
    sampled; else the role in small letters, such as "prompt".
    """
    names = [Role(role).name.lower() for role in trajectory.roles_T]
    longest_first = sorted(
        ((name, *span) for name, spans in trajectory.spans.items() for span in spans),
        key=lambda span: span[1] - span[2],
    )
    for name, start, end in longest_first:
        for t in range(start, end):
            if trajectory.roles_T[t] == Role.MODEL:
                names[t] = name
    parts, at = [], 0
    for name, run in itertools.groupby(names):
        length = len(list(run))
        parts.append((name, at, at + length))
        at += length
    return parts


def _runs(mask_T: np.ndarray) -> list[tuple[int, int]]:
    """Returns where a mask is true, as (start, end)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask_T, [0]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _find_tags(ids: np.ndarray, tokenizer: Text, tags: Tags) -> list[tuple[str, int, int]]:
    """Returns each tag in the text of ids, with its first token and the one behind its last.

    The text of the first so many ids has ever more tags, the more they are: so where a tag ends is
    searched for by halves, in a block of tokens that has one.
    """
    pattern = re.compile("|".join(re.escape(tag) for pair in tags.values() for tag in pair))
    overlap = _longest(tags)
    found = []
    for block in range(0, len(ids), BLOCK):
        first, last = max(block - overlap, 0), min(block + BLOCK, len(ids))

        def tags_until(end: int, first: int = first) -> list[str]:
            return pattern.findall(_decode(tokenizer, ids[first:end]))

        known = len(tags_until(block))
        for number, tag in enumerate(tags_until(last)[known:], start=known + 1):
            end = bisect.bisect_left(
                range(last + 1), number, lo=block, key=lambda end: len(tags_until(end))
            )
            start = end - 1
            while tag not in _decode(tokenizer, ids[start:end]):
                start -= 1
            found.append((tag, start, end))
    return found


def _longest(tags: Tags) -> int:
    """Returns the most tokens that a tag may have: a token has a byte at least. And some space."""
    return max(len(tag) for pair in tags.values() for tag in pair) + 8


def _decode(tokenizer: Text, ids: Sequence[int] | np.ndarray) -> str:
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)
