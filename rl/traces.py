"""Keeps some of the completions that a policy learns from, to be read by a person.

A line is a trajectory (rl/trajectory_file.py) with its step, problem and reward, and its text in
parts, each with what it is (`rl.spans.parts_of`): {"part": "thought", "text": "<think>..."}.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from files import AppendedFile, write_text
from rl.halting import Text
from rl.rollouts import Group
from rl.spans import parts_of
from rl.trajectory_file import as_record


class Traces:
    """Appends to `workdir/traces.jsonl`; on processes other than the first it does nothing.

    Args:
      completions: how many of a step are kept, the first ones; -1 for all.
      tokenizer: decodes them.
      resume_step: the step the run goes on from. Lines of later steps come from a run that died
        after its last checkpoint, and are dropped; from 0, all of them.

    Raises:
      UserError: the workdir cannot be written to; here and in `write`.
    """

    def __init__(self, workdir: Path, completions: int, tokenizer: Text, resume_step: int):
        self._file, self._completions, self._tokenizer = None, completions, tokenizer
        if jax.process_index() != 0:
            return
        path = workdir / "traces.jsonl"
        if path.exists():
            kept = [line for line in path.read_bytes().split(b"\n") if _until(resume_step, line)]
            write_text(path, "".join(f"{line.decode()}\n" for line in kept))
        self._file = AppendedFile(path)

    def write(self, step: int, groups: Sequence[Group]) -> None:
        """Adds the first completions of the groups of a step, with what each earns."""
        if self._file is None:
            return
        completions = (
            (group.problem, completion, float(total))
            for group in groups
            for completion, total in zip(
                group.completions, group.rewards.total_PG.ravel(), strict=True
            )
        )
        kept = None if self._completions == -1 else self._completions
        for problem, completion, total in itertools.islice(completions, kept):
            trajectory = completion.trajectory
            record = {
                "step": step,
                "prompt": problem.question,
                "completion": completion.text,
                "answer": problem.answer,
                "reward": round(total, 6),
                "parts": [
                    {"part": part, "text": self._decode(trajectory.tokens_T[start:end])}
                    for part, start, end in parts_of(trajectory)
                ],
            }
            record |= as_record(trajectory)
            self._file.append((json.dumps(record) + "\n").encode())

    def _decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "Traces":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _until(step: int, line: bytes) -> bool:
    """Returns whether a line is a record of a step up to `step`."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):
        return False
