"""Keeps some of the completions that a policy learns from, to be read by a person."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax

from data.tasks.problem import Problem
from files import AppendedFile, write_text
from rl.generate import Completion

COMPLETIONS = 2  # of a step's first problem


class Traces:
    """Appends to `workdir/traces.jsonl`; on processes other than the first it does nothing.

    Args:
      resume_step: the step the run goes on from. Lines of later steps come from a run that died
        after its last checkpoint, and are dropped; from 0, all of them.

    Raises:
      UserError: the workdir cannot be written to; here and in `write`.
    """

    def __init__(self, workdir: Path, resume_step: int):
        self._file = None
        if jax.process_index() != 0:
            return
        path = workdir / "traces.jsonl"
        if path.exists():
            kept = [line for line in path.read_bytes().split(b"\n") if _until(resume_step, line)]
            write_text(path, "".join(f"{line.decode()}\n" for line in kept))
        self._file = AppendedFile(path)

    def write(
        self,
        step: int,
        problem: Problem,
        completions: Sequence[Completion],
        rewards: Sequence[float],
    ) -> None:
        """Adds the first completions of a problem, with what each earns."""
        if self._file is None:
            return
        for completion, reward in zip(completions[:COMPLETIONS], rewards, strict=False):
            record = {
                "step": step,
                "prompt": problem.question,
                "completion": completion.text,
                "answer": problem.answer,
                "reward": round(float(reward), 6),
            }
            self._file.append((json.dumps(record) + "\n").encode())

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
