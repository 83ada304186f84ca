"""Starts one command on every host of a TPU slice, a GKE cluster or a Slurm cluster, and looks
after it.

    python -m launch.pod --on=tpu --name=my-slice --zone=us-central2-b -- python -m launch.pretrain
    --config=configs/x.py --workdir=/mnt/runs/x python -m launch.pod --on=gke --name=x
    --cluster=my-cluster --tpu_type=v5litepod-64 -- python -m launch.pretrain --config=configs/x.py
    ... python -m launch.pod --on=slurm --name=x --nodes=4 --gpus=8 --sbatch=--partition=gpu --
    python -m launch.pretrain --config=configs/x.py ... python -m launch.pod --on=tpu
    --name=my-slice --zone=us-central2-b --action=logs        (or status, stop)

--dry_run prints the shell commands and runs none. The tree that runs is what git sees here,
uncommitted and new files included (on Slurm: this directory itself). --workdir must be a directory
that all hosts share: Filestore, or a bucket mounted with gcsfuse. The same command again goes on
where a run stopped.
"""

import re
import shlex
import shutil
import subprocess
import sys
from typing import NamedTuple

from errors import UserError
from experiment.command_line import Flag, command

HERE = "runs/pod"  # what this command writes, below the current directory; git must ignore it
THERE = "athanor"  # the tree, below the home directory of each TPU host
PYTHON = "3.12"  # of TPU hosts, whose own is older than this codebase needs

FLAGS = {
    "on": Flag("tpu", "where", ("tpu", "gke", "slurm")),
    "action": Flag("run", "what to do", ("run", "status", "logs", "stop")),
    "name": Flag("", "tpu: of the slice; gke, slurm: you choose"),
    "zone": Flag("", "tpu, gke: Google Cloud zone"),
    "project": Flag("", "tpu, gke: Google Cloud project; without it gcloud's own"),
    "cluster": Flag("", "gke: the cluster"),
    "tpu_type": Flag("", "gke: such as v5litepod-64"),
    "slices": Flag(1, "gke: slices of that type"),
    "base_image": Flag(
        "",
        f"gke: image the tree is copied onto and requirements installed in at start (python:{PYTHON})",
    ),
    "docker_image": Flag(
        "", "gke: image that has tree and requirements already, in place of --base_image"
    ),
    "nodes": Flag(1, "slurm: machines"),
    "gpus": Flag(8, "slurm: GPUs a machine, a process each"),
    "sbatch": Flag((), "slurm: an option for sbatch, such as --sbatch=--time=24:00:00"),
    "dry_run": Flag(False, "print what would be run, run nothing"),
}


class Place(NamedTuple):
    """What one kind of cluster needs."""

    tools: tuple[str, ...]  # programs that must be installed here
    needs: tuple[str, ...]  # flags that must be given
    takes: tuple[str, ...]  # flags that may be
    longest_name: int


PLACES = {
    "tpu": Place(("gcloud", "git"), ("name", "zone"), ("project",), 63),
    "gke": Place(
        ("xpk", "git", "kubectl"),
        ("name", "cluster"),
        ("zone", "project", "tpu_type", "slices", "base_image", "docker_image"),
        40,
    ),
    "slurm": Place(("sbatch",), ("name",), ("nodes", "gpus", "sbatch"), 63),
}


def snapshot(name: str) -> list[str]:
    """Shell commands that pack the working tree as git sees it, through an index of its own:
    nothing is staged or committed.
    """
    index = f"GIT_INDEX_FILE={HERE}/{name}.index"
    return [
        f"mkdir -p {HERE}",
        f"{index} git add --all",
        f"git archive --format=tar.gz --output={HERE}/{name}.tar.gz $({index} git write-tree)",
    ]


def tpu(action: str, words: list[str], *, name: str, zone: str, project: str) -> list[str]:
    """Shell commands for a TPU slice, by `gcloud compute tpus tpu-vm`
    (docs.cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh).
    """
    where = [f"--zone={zone}", *([f"--project={project}"] if project else [])]

    def ssh(script: str, worker: str = "all") -> str:
        return shlex.join(
            [
                "gcloud",
                "compute",
                "tpus",
                "tpu-vm",
                "ssh",
                name,
                f"--worker={worker}",
                *where,
                f"--command={script}",
            ]
        )

    alive = 'kill -0 "$(cat pod.pid 2>/dev/null)" 2>/dev/null'
    if action == "status":
        return [
            ssh(
                f'cd {THERE} && if {alive}; then echo "$(hostname): running"; else echo "$(hostname): ended"; fi; tail -n 1 pod.log'
            )
        ]
    if action == "logs":
        return [ssh(f"tail -n 200 -F {THERE}/pod.log", worker="0")]
    if action == "stop":
        return [ssh(f'cd {THERE} && kill -TERM "$(cat pod.pid)"')]
    unpack = (
        f"mkdir -p {THERE} && cd {THERE} && if {alive}; then echo 'a run is going on here; --action=stop ends it'; exit 1; fi && "
        "find . -mindepth 1 -maxdepth 1 ! -name .venv ! -name runs ! -name pod.log -exec rm -rf {} + && tar -xzf ../athanor.tar.gz"
    )
    install = (
        f"cd {THERE} && python3 -m pip install --quiet --user uv && (test -x .venv/bin/python || python3 -m uv venv --quiet --python {PYTHON} .venv) && "
        "python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.txt 'jax[tpu]'"
    )
    # setsid and nohup: the run outlives this ssh. The log is appended to, so that a restart keeps
    # what went before.
    start = (
        f'cd {THERE} && export PATH="$PWD/.venv/bin:$PATH" ATHANOR_DISTRIBUTED=1 && '
        f"{{ nohup setsid {shlex.join(words)} >> pod.log 2>&1 < /dev/null & echo $! > pod.pid; }}"
    )
    copy = [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "scp",
        f"{HERE}/{name}.tar.gz",
        f"{name}:athanor.tar.gz",
        "--worker=all",
        *where,
    ]
    return [*snapshot(name), shlex.join(copy), ssh(unpack), ssh(install), ssh(start)]


def gke(
    action: str,
    words: list[str],
    *,
    name: str,
    cluster: str,
    zone: str,
    project: str,
    tpu_type: str,
    slices: int,
    base_image: str,
    docker_image: str,
) -> list[str]:
    """Shell commands for a GKE cluster, by `xpk workload` (github.com/AI-Hypercomputer/xpk,
    src/xpk/parser/workload.py).
    """
    where = [
        f"--cluster={cluster}",
        *([f"--zone={zone}"] if zone else []),
        *([f"--project={project}"] if project else []),
    ]
    if action == "status":
        return [shlex.join(["xpk", "workload", "list", *where, f"--filter-by-job={name}"])]
    if action == "logs":  # xpk makes a JobSet; host 0 of slice 0 speaks for the run
        host = f"jobset.sigs.k8s.io/jobset-name={name},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
        return [
            shlex.join(
                [
                    "kubectl",
                    "logs",
                    f"--selector={host}",
                    "--all-containers",
                    "--tail=200",
                    "--follow",
                ]
            )
        ]
    if action == "stop":
        return [shlex.join(["xpk", "workload", "delete", *where, f"--workload={name}"])]
    if not tpu_type:
        raise UserError(
            "--tpu_type is missing: what --on=gke runs on, such as --tpu_type=v5litepod-64"
        )
    if base_image and docker_image:
        raise UserError("--base_image and --docker_image: give one of them")
    create = [
        "xpk",
        "workload",
        "create",
        *where,
        f"--workload={name}",
        f"--tpu-type={tpu_type}",
        f"--num-slices={slices}",
        "--env=ATHANOR_DISTRIBUTED=1",
    ]
    if docker_image:
        return [
            shlex.join(
                [*create, f"--docker-image={docker_image}", f"--command={shlex.join(words)}"]
            )
        ]
    tree = f"{HERE}/{name}"
    export = [f"rm -rf {tree} && mkdir {tree} && tar -xzf {tree}.tar.gz -C {tree}"]
    script = f"pip install --quiet -r requirements.txt 'jax[tpu]' && {shlex.join(words)}"
    image = [f"--base-docker-image={base_image or f'python:{PYTHON}'}", f"--script-dir={tree}"]
    return [*snapshot(name), *export, shlex.join([*create, *image, f"--command={script}"])]


def slurm(
    action: str, words: list[str], *, name: str, nodes: int, gpus: int, sbatch: tuple[str, ...]
) -> list[str]:
    """Shell commands for a Slurm cluster. JAX finds the other processes by SLURM_*, and gives
    process i of a machine GPU i: so all must see all GPUs.
    """
    if action == "status":
        return [f"squeue --me --name={name}"]
    if action == "logs":
        return [f'tail -n 200 -F "$(ls -t {HERE}/{name}-*.log | head -n 1)"']
    if action == "stop":
        return [f"scancel --me --name={name}"]
    if nodes < 1 or gpus < 0:
        raise UserError(f"--nodes={nodes} --gpus={gpus}: at least one machine, and 0 GPUs or more")
    options = [
        f"--job-name={name}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={max(gpus, 1)}",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
    ]
    options += [
        f"--output={HERE}/{name}-%j.log",
        "--signal=TERM@120",
        *sbatch,
    ]  # two minutes before its time is up a run saves and ends
    script = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        "export ATHANOR_DISTRIBUTED=1",
        'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # srun does not take it from sbatch by itself',
        f"srun --kill-on-bad-exit=1 {shlex.join(words)}",
    ]
    write = "\n".join([f"cat > {HERE}/{name}.sbatch <<'END_OF_SCRIPT'", *script, "END_OF_SCRIPT"])
    return [f"mkdir -p {HERE}", write, f"sbatch {HERE}/{name}.sbatch"]


def run(*, on: str, action: str, dry_run: bool, words: list[str], **given) -> None:
    place = PLACES[on]
    for flag, value in given.items():
        if flag in place.needs and not value:
            raise UserError(f"--{flag} is missing: {FLAGS[flag].help} (for --on={on})")
        if flag not in place.needs + place.takes and value != FLAGS[flag].default:
            raise UserError(f"--{flag}: not used with --on={on}")
    name = given["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > place.longest_name:
        raise UserError(
            f"--name={name}: must be lower-case letters, digits and hyphens, from a letter, at most {place.longest_name}"
        )
    if action == "run" and not words:
        raise UserError(
            "what to run is missing: end with -- python -m launch.pretrain --config=... --workdir=..."
        )
    if action != "run" and words:
        raise UserError(f"{words[0]}: --action={action} runs nothing; drop what stands after --")
    steps = {"tpu": tpu, "gke": gke, "slurm": slurm}[on](
        action, words, **{flag: given[flag] for flag in place.needs + place.takes}
    )
    if dry_run:
        print("\n".join(steps))
        return
    for tool in place.tools:
        if shutil.which(tool) is None:
            raise UserError(
                f"{tool}: not installed here, and --on={on} needs it; --dry_run shows the commands for a machine that has it"
            )
    for step in steps:
        print(f"+ {step}", file=sys.stderr, flush=True)
        if code := subprocess.run(["bash", "-c", step]).returncode:
            raise UserError(f"exit {code} from: {step.splitlines()[0]}")


if __name__ == "__main__":
    command(run, config="none", workdir=False, flags=FLAGS, rest="words")
