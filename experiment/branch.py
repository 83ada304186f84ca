"""Branches: a run that goes on from another run's whole state, with another schedule or data."""

import dataclasses
from pathlib import Path

import jax

from checkpoints.locations import run_directory
from checkpoints.whole import steps_in
from experiment.schema import Config, parse
from experiment.workdir import recorded_config
from files import read_json
from train.restore import Branch


def branch_of(config: Config, command: str, workdir: Path) -> Branch | None:
    """Returns what a new run takes over from `init_from` besides parameters, and says so in a line.

    It is None where that is nothing, or where the run in `workdir` has a checkpoint of its own. The
    data go on where the other run's newest checkpoint stands, if they are the same documents in the
    same rows: the command, the seed and the section `data` are equal but for data.bad_records. Else
    they begin anew. Raises UserError if `init_from` has no record.
    """
    if config.init_state == "parameters" or steps_in(workdir / "checkpoints"):
        return None
    run = run_directory(config.init_from)
    theirs, ours = parse(recorded_config(run)), config
    different = [
        f"data.{field.name}"
        for field in dataclasses.fields(ours.data)
        if field.name != "bad_records"
        and getattr(theirs.data, field.name) != getattr(ours.data, field.name)
    ]
    if theirs.seed != ours.seed:
        different.append("seed")
    if read_json(run / "config.json").get("command") != command:
        different.append("the command")
    if jax.process_index() == 0:
        data = f"begin anew ({different[0]} differs)" if different else "go on"
        print(f"branches off {config.init_from}: parameters, optimizer, step; the data {data}")
    return Branch(ours.train.steps, same_data=not different)
