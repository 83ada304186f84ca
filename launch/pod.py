r"""Starts one command on every host of a TPU slice, a GKE or a Slurm cluster, and looks after it.

    python -m launch.pod --on=tpu --name=my-slice --zone=us-central2-b -- \
        python -m launch.pretrain --config=configs/x.py --workdir=/mnt/runs/x
    python -m launch.pod --on=gke --name=x --cluster=my-cluster --tpu_type=v5litepod-64 -- \
        python -m launch.pretrain --config=configs/x.py ...
    python -m launch.pod --on=slurm --name=x --nodes=4 --gpus=8 --sbatch=--partition=gpu -- \
        python -m launch.pretrain --config=configs/x.py ...
    python -m launch.pod --on=tpu --name=my-slice --zone=us-central2-b --action=logs

The actions are run, status, logs and stop. --dry_run prints the shell commands and runs none. The
tree that runs is what git sees here, uncommitted and new files included (on Slurm: this directory
itself). --workdir must be a directory that all hosts share: Filestore, or a bucket mounted with
gcsfuse. The same command again goes on where a run stopped.
"""

import re
import shutil
import subprocess
import sys
from typing import Any

from errors import UserError
from experiment.clusters import CLUSTERS, PYTHON, Cluster
from experiment.command_line import command
from experiment.flags import Flag

FLAGS = {
    "on": Flag("tpu", "where", tuple(CLUSTERS)),
    "action": Flag("run", "what to do", ("run", "status", "logs", "stop")),
    "name": Flag("", "tpu: of the slice; gke, slurm: you choose"),
    "zone": Flag("", "tpu, gke: Google Cloud zone"),
    "project": Flag("", "tpu, gke: Google Cloud project; without it gcloud's own"),
    "cluster": Flag("", "gke: the cluster"),
    "tpu_type": Flag("", "gke: such as v5litepod-64"),
    "slices": Flag(1, "gke: slices of that type"),
    "base_image": Flag(
        "",
        "gke: image the tree is copied onto and requirements installed in at start "
        f"(python:{PYTHON})",
    ),
    "docker_image": Flag(
        "", "gke: image that has tree and requirements already, in place of --base_image"
    ),
    "nodes": Flag(1, "slurm: machines"),
    "gpus": Flag(8, "slurm: GPUs a machine, a process each"),
    "sbatch": Flag((), "slurm: an option for sbatch, such as --sbatch=--time=24:00:00"),
    "dry_run": Flag(False, "print what would be run, run nothing"),
}


def run(*, on: str, action: str, dry_run: bool, words: list[str], **flags: Any) -> None:
    """Runs the shell commands of an action one after another, or prints them.

    Raises:
      UserError: the command line is wrong, a program is missing, or a command fails.
    """
    cluster = CLUSTERS[on]
    check_flags(on, cluster, flags)
    if action == "run" and not words:
        raise UserError(
            "what to run is missing: end with -- python -m launch.pretrain --config=... "
            "--workdir=..."
        )
    if action != "run" and words:
        raise UserError(f"{words[0]}: --action={action} runs nothing; drop what stands after --")
    used = {flag: flags[flag] for flag in cluster.required + cluster.optional}
    steps = cluster.commands(action, words, **used)
    if dry_run:
        print("\n".join(steps))
        return
    for program in cluster.programs:
        if shutil.which(program) is None:
            raise UserError(
                f"{program}: not installed here, and --on={on} needs it; "
                "--dry_run shows the commands for a machine that has it"
            )
    for step in steps:
        print(f"+ {step}", file=sys.stderr, flush=True)
        if code := subprocess.run(["bash", "-c", step]).returncode:
            raise UserError(f"exit {code} from: {step.splitlines()[0]}")


def check_flags(on: str, cluster: Cluster, flags: dict[str, Any]) -> None:
    """Raises UserError for a flag that is missing, has no use on the cluster, or is no name."""
    for flag, value in flags.items():
        if flag in cluster.required and not value:
            raise UserError(f"--{flag} is missing: {FLAGS[flag].help} (for --on={on})")
        known = cluster.required + cluster.optional
        if flag not in known and value != FLAGS[flag].default:
            raise UserError(f"--{flag}: not used with --on={on}")
    name = flags["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > cluster.longest_name:
        raise UserError(
            f"--name={name}: must be lower-case letters, digits and hyphens, from a letter, "
            f"at most {cluster.longest_name}"
        )


if __name__ == "__main__":
    command(run, config="none", workdir=False, flags=FLAGS, rest="words")
