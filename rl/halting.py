"""Where a completion halts before its stop id or its last token: at a text, or at a budget."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from errors import UserError
from rl.engine import MOST_STEPS
from rl.request import Prompt, Resumed, Turn
from rl.trajectory import LENGTH, Role, Trajectory


class Text(Protocol):
    """What is needed of a tokenizer here."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of ids."""
        ...


class StopTexts:
    """Halts a completion with the first token that completes one of some texts.

    Raises UserError for a text that the tokenizer cannot write.
    """

    def __init__(self, tokenizer: Text, texts: Sequence[str]):
        self._tokenizer, self._texts = tokenizer, tuple(texts)
        for text in self._texts:
            if not text or text not in self._decode(tokenizer.encode(text)):
                raise UserError(f"stop text {text!r}: the tokenizer cannot write it")
        # A token has a byte at least; the last few are those that were not looked at before.
        self._window = MOST_STEPS + max(len(text.encode()) for text in self._texts)

    def __call__(self, ids: np.ndarray) -> int | None:
        """Returns how many of the ids end with such a text, the fewest, or None."""
        first = max(len(ids) - self._window, 0)
        if not self._in(ids[first:]):
            return None
        return next(end for end in range(first, len(ids) + 1) if self._in(ids[first:end]))

    def _in(self, ids: Sequence[int] | np.ndarray) -> bool:
        text = self._decode(ids)
        return any(each in text for each in self._texts)

    def _decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


@dataclasses.dataclass(frozen=True)
class StopSequences:
    """Halts a completion with the last id of one of some sequences of ids."""

    sequences: tuple[tuple[int, ...], ...]

    def __call__(self, ids: np.ndarray) -> int | None:
        """Returns how many of the ids end with such a sequence, the fewest, or None."""
        ends = [
            end
            for sequence in self.sequences
            for end in range(len(sequence), len(ids) + 1)
            if tuple(ids[end - len(sequence) : end]) == sequence
        ]
        return min(ends, default=None)


@dataclasses.dataclass(frozen=True)
class ThinkingBudget:
    """Bounds how long a completion thinks, by phrases that are put into its mouth.

    When its thinking has had `most_tokens`, the interruption is read and it answers (ScaleRL, arXiv
    2510.13786). An end of its own is taken back as often as `waits` says, and `wait`
    read in its place (budget forcing, arXiv 2501.19393). What is read so has the role INJECTED.

    Attributes:
      tokenizer: reads and writes texts.
      most_tokens: tokens that may be sampled before the end of thinking.
      answer_tokens: tokens that may be sampled after it.
      stops: ids with which the answer ends.
      end: the text that ends thinking.
      interruption: what is read when the budget is used up; it has `end` in it.
      waits, wait: how often an end is taken back, and what is read then.
    """

    tokenizer: Text
    most_tokens: int
    answer_tokens: int
    stops: tuple[int, ...]
    end: str = "</think>"
    interruption: str = "\nOkay, time is up. Let me stop thinking and answer now.\n</think>\n"
    waits: int = 0
    wait: str = "Wait"

    def __post_init__(self):
        if self.end not in self.interruption:
            raise UserError(f"the interruption {self.interruption!r} does not end thinking")
        StopTexts(self.tokenizer, [self.end])  # raises where the tokenizer cannot write it

    @property
    def _halts(self) -> StopTexts:
        return StopTexts(self.tokenizer, [self.end])

    def prompt(self, tokens: Sequence[int], keys_G2: np.ndarray, group: int = 0) -> Prompt:
        """Returns a prompt whose completions keep to this budget."""
        return Prompt(
            tokens, keys_G2, self.most_tokens, self.stops, group=group, reply=self.reply,
            halts=self._halts, resumes=self.resumes,
        )  # fmt: skip

    def reply(self, trajectory: Trajectory) -> Turn | None:
        """Returns what follows a completion that has halted."""
        ids = trajectory.completion.tolist()
        injected = trajectory.roles_T[-len(ids) :] == Role.INJECTED
        text = self._decode(ids)
        if self.end in self._decode(ids[:-1]):
            return None  # it has answered
        if self.end not in text:
            return self._turn(self.interruption) if trajectory.ended == LENGTH else None
        waited = int(np.sum(np.diff(np.append(0, injected)) == 1))
        if waited == self.waits:
            return self._turn("")
        before = text.index(self.end)
        kept = len(ids)
        while len(self._decode(ids[:kept])) > before:
            kept -= 1
        left = self.most_tokens - int(np.sum(~injected[:kept]))
        if left < 1:
            return self._turn("")
        return dataclasses.replace(
            self._turn(self.wait),
            max_new_tokens=left,
            halts=self._halts,
            take_back=len(ids) - kept,
        )

    def resumes(self, trajectory: Trajectory) -> Resumed:
        """Returns how a completion goes on that has not ended: its thought, or its answer."""
        ids = trajectory.completion.tolist()
        injected = trajectory.roles_T[len(trajectory.roles_T) - len(ids) :] == Role.INJECTED
        begins = int(np.max(np.flatnonzero(injected), initial=-1)) + 1
        if self.end in self._decode(ids):
            in_turn = len(ids) - max(begins, self.end_of_thought(ids))
            turn = self._turn("")
            return Resumed(
                dataclasses.replace(turn, max_new_tokens=self.answer_tokens - in_turn), in_turn
            )
        left = self.most_tokens - int(np.sum(~injected))
        turn = dataclasses.replace(self._turn(""), max_new_tokens=left, halts=self._halts)
        return Resumed(turn, len(ids) - begins)

    def end_of_thought(self, ids: Sequence[int]) -> int:
        """Returns how many ids there are up to the first end of a thought; all of them without."""
        low, high = 0, len(ids)
        if self.end not in self._decode(ids):
            return high
        while low < high:
            middle = (low + high) // 2
            found = self.end in self._decode(ids[:middle])
            low, high = (low, middle) if found else (middle + 1, high)
        return low

    def _turn(self, text: str) -> Turn:
        ids = self.tokenizer.encode(text) if text else []
        return Turn(ids, Role.INJECTED, self.answer_tokens, self.stops)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)
