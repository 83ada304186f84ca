"""Finds the newest checkpoint of a run that is whole on the disk.

A checkpoint that is damaged is said in one line, and an older one is taken. The process that trains
puts it out of the way, because its own next checkpoint may have that step; who only reads leaves
all as it is. Where nothing is whole there is an error: a run never begins anew by itself.
"""

import itertools
import json
import sys
from pathlib import Path

import jax

from checkpoints.agreement import first_told, told
from checkpoints.checksums import damage
from checkpoints.disk_errors import disk_errors
from errors import UserError


def steps_in(directory: Path) -> list[int]:
    """Returns the steps of the checkpoints in a directory, ascending; none if it is not there.

    That is what process 0 sees, on all processes alike.
    """
    steps = []
    if jax.process_index() == 0 and directory.is_dir():
        names = (path.name for path in directory.iterdir() if path.is_dir())
        steps = sorted(int(name) for name in names if is_step(name))
    return json.loads(told(json.dumps(steps[-100:]))[0])  # as many as a message takes


def is_step(name: str) -> bool:
    """Returns whether this is the name of a checkpoint in its directory."""
    return name.isascii() and name.isdigit() and str(int(name)) == name


def damage_of(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None; the processes share out the reading."""
    return first_told(damage(checkpoint, jax.process_index(), jax.process_count()))


def newest_whole(directory: Path) -> int | None:
    """Returns the step of the newest checkpoint that is whole, or None if there are none at all.

    The run may train meanwhile and delete what is read here; then there are newer ones.

    Raises:
      UserError: there are checkpoints, and each is damaged.
    """
    while True:
        steps, damaged = steps_in(directory), {}
        for step in reversed(steps):
            what = damage_of(directory / str(step))
            if what is None:
                for bad, why in damaged.items():
                    _warn(f"{directory / str(bad)}: damaged ({why}); step {step} is read instead")
                return step
            damaged[step] = what
            if steps_in(directory)[-1:] != steps[-1:]:
                break
        else:
            if damaged:
                raise UserError(_nothing_whole(directory, damaged))
            return None


def set_damaged_aside(directory: Path) -> None:
    """Renames the checkpoints that are newer than the newest whole one, and damaged.

    Raises:
      UserError: there are checkpoints, and each is damaged; or one cannot be renamed.
    """
    damaged = {}
    for step in reversed(steps_in(directory)):
        what = damage_of(directory / str(step))
        if what is None:
            for bad, why in damaged.items():
                aside = _set_aside(directory / str(bad))
                _warn(
                    f"{directory / str(bad)}: damaged ({why}); it is set aside as {aside.name}, "
                    f"and the run goes on from step {step}"
                )
            first_told(None)  # no process goes on before the first has renamed
            return
        damaged[step] = what
    if damaged:
        raise UserError(_nothing_whole(directory, damaged))


def _set_aside(checkpoint: Path) -> Path:
    names = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    free = (checkpoint.with_name(f"{checkpoint.name}.damaged{name}") for name in names)
    aside = next(path for path in free if not path.exists())
    if jax.process_index() == 0:
        with disk_errors(lambda why: f"{checkpoint}: damaged, and cannot be renamed: {why}"):
            checkpoint.rename(aside)
    return aside


def _nothing_whole(directory: Path, damaged: dict[int, str]) -> str:
    step, what = next(iter(damaged.items()))
    more = f", and so are {len(damaged) - 1} older ones" if len(damaged) > 1 else ""
    return (
        f"{directory / str(step)}: damaged ({what}){more}; put back a whole copy, or delete "
        f"{directory} to begin anew"
    )


def _warn(line: str) -> None:
    if jax.process_index() == 0:
        print(f"warning: {line}", file=sys.stderr, flush=True)
