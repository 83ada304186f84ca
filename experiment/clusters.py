"""Writes the shell commands that start one command on every host of a cluster and look after it.

Each kind of cluster is a row of CLUSTERS: the programs and flags that it needs, and a function
(action, argv, **flags) -> shell commands, where `argv` is what every host starts, and the action is
"run", "status", "logs" or "stop". Nothing is run here.
"""

import shlex
from collections.abc import Callable
from typing import NamedTuple

from errors import UserError

LOCAL_DIRECTORY = "runs/pod"  # where the commands write, below the current one; git must ignore it
REMOTE_DIRECTORY = "athanor"  # the tree, below the home directory of each TPU host
PYTHON = "3.12"  # of TPU hosts, whose own is older than this codebase needs
# Lets JAX find the other processes by itself (experiment/processes.py).
DISTRIBUTED = "ATHANOR_DISTRIBUTED=1"


def snapshot(name: str) -> list[str]:
    """Returns commands that pack the working tree as git sees it.

    They use an index of their own: nothing is staged or committed.
    """
    index = f"GIT_INDEX_FILE={LOCAL_DIRECTORY}/{name}.index"
    archive = f"{LOCAL_DIRECTORY}/{name}.tar.gz"
    return [
        f"mkdir -p {LOCAL_DIRECTORY}",
        f"{index} git add --all",
        f"git archive --format=tar.gz --output={archive} $({index} git write-tree)",
    ]


def tpu(action: str, argv: list[str], *, name: str, zone: str, project: str) -> list[str]:
    """Returns the commands for a TPU slice, by `gcloud compute tpus tpu-vm`.

    docs.cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh
    """
    gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]
    where = [f"--zone={zone}", *([f"--project={project}"] if project else [])]

    def ssh(script: str, worker: str = "all") -> str:
        options = [f"--worker={worker}", *where, f"--command={script}"]
        return shlex.join([*gcloud, "ssh", name, *options])

    alive = 'kill -0 "$(cat pod.pid 2>/dev/null)" 2>/dev/null'
    if action == "status":
        state = f'if {alive}; then echo "$(hostname): running"; else echo "$(hostname): ended"; fi'
        return [ssh(f"cd {REMOTE_DIRECTORY} && {state}; tail -n 1 pod.log")]
    if action == "logs":
        return [ssh(f"tail -n 200 -F {REMOTE_DIRECTORY}/pod.log", worker="0")]
    if action == "stop":
        return [ssh(f'cd {REMOTE_DIRECTORY} && kill -TERM "$(cat pod.pid)"')]
    unpack = (
        f"mkdir -p {REMOTE_DIRECTORY} && cd {REMOTE_DIRECTORY} && "
        f"if {alive}; then echo 'a run is going on here; --action=stop ends it'; exit 1; fi && "
        "find . -mindepth 1 -maxdepth 1 ! -name .venv ! -name runs ! -name pod.log "
        "-exec rm -rf {} + && tar -xzf ../athanor.tar.gz"
    )
    install = (
        f"cd {REMOTE_DIRECTORY} && python3 -m pip install --quiet --user uv && "
        "(test -x .venv/bin/python || "
        f"python3 -m uv venv --quiet --python {PYTHON} .venv) && "
        "python3 -m uv pip install --quiet --python .venv/bin/python "
        "-r requirements.txt 'jax[tpu]'"
    )
    # setsid and nohup: the run outlives this ssh. The log is appended to, so that a restart keeps
    # what went before.
    start = (
        f'cd {REMOTE_DIRECTORY} && export PATH="$PWD/.venv/bin:$PATH" {DISTRIBUTED} && '
        f"{{ nohup setsid {shlex.join(argv)} >> pod.log 2>&1 < /dev/null & echo $! > pod.pid; }}"
    )
    archive = f"{LOCAL_DIRECTORY}/{name}.tar.gz"
    copy = [*gcloud, "scp", archive, f"{name}:athanor.tar.gz", "--worker=all", *where]
    return [*snapshot(name), shlex.join(copy), ssh(unpack), ssh(install), ssh(start)]


def gke(
    action: str,
    argv: list[str],
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
    """Returns the commands for a GKE cluster, by `xpk workload`.

    github.com/AI-Hypercomputer/xpk, src/xpk/parser/workload.py

    Raises:
      UserError: flags are missing, or exclude each other.
    """
    where = [
        f"--cluster={cluster}",
        *([f"--zone={zone}"] if zone else []),
        *([f"--project={project}"] if project else []),
    ]
    xpk = ["xpk", "workload"]
    if action == "status":
        return [shlex.join([*xpk, "list", *where, f"--filter-by-job={name}"])]
    if action == "logs":  # xpk makes a JobSet; host 0 of slice 0 speaks for the run
        host = (
            f"jobset.sigs.k8s.io/jobset-name={name},jobset.sigs.k8s.io/job-index=0,"
            "batch.kubernetes.io/job-completion-index=0"
        )
        options = [f"--selector={host}", "--all-containers", "--tail=200", "--follow"]
        return [shlex.join(["kubectl", "logs", *options])]
    if action == "stop":
        return [shlex.join([*xpk, "delete", *where, f"--workload={name}"])]
    if not tpu_type:
        raise UserError(
            "--tpu_type is missing: what --on=gke runs on, such as --tpu_type=v5litepod-64"
        )
    if base_image and docker_image:
        raise UserError("--base_image and --docker_image: give one of them")
    create = [
        *[*xpk, "create", *where, f"--workload={name}"],
        *[f"--tpu-type={tpu_type}", f"--num-slices={slices}", f"--env={DISTRIBUTED}"],
    ]
    command = shlex.join(argv)
    if docker_image:
        image = [f"--docker-image={docker_image}"]
        return [shlex.join([*create, *image, f"--command={command}"])]
    tree = f"{LOCAL_DIRECTORY}/{name}"
    export = [f"rm -rf {tree} && mkdir {tree} && tar -xzf {tree}.tar.gz -C {tree}"]
    script = f"pip install --quiet -r requirements.txt 'jax[tpu]' && {command}"
    image = [f"--base-docker-image={base_image or f'python:{PYTHON}'}", f"--script-dir={tree}"]
    return [*snapshot(name), *export, shlex.join([*create, *image, f"--command={script}"])]


def slurm(
    action: str, argv: list[str], *, name: str, nodes: int, gpus: int, sbatch: tuple[str, ...]
) -> list[str]:
    """Returns the commands for a Slurm cluster.

    JAX finds the other processes by SLURM_*, and gives process i of a machine GPU i: so all of them
    must see all GPUs.

    Raises:
      UserError: too few nodes or GPUs.
    """
    if action == "status":
        return [f"squeue --me --name={name}"]
    if action == "logs":
        return [f'tail -n 200 -F "$(ls -t {LOCAL_DIRECTORY}/{name}-*.log | head -n 1)"']
    if action == "stop":
        return [f"scancel --me --name={name}"]
    if nodes < 1 or gpus < 0:
        raise UserError(f"--nodes={nodes} --gpus={gpus}: at least one machine, and 0 GPUs or more")
    options = [
        f"--job-name={name}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={max(gpus, 1)}",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        f"--output={LOCAL_DIRECTORY}/{name}-%j.log",
        "--signal=TERM@120",  # two minutes before its time is up a run saves and ends
        *sbatch,
    ]
    script = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        f"export {DISTRIBUTED}",
        'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"'
        "  # srun does not take it from sbatch by itself",
        f"srun --kill-on-bad-exit=1 {shlex.join(argv)}",
    ]
    file = f"{LOCAL_DIRECTORY}/{name}.sbatch"
    write = "\n".join([f"cat > {file} <<'END_OF_SCRIPT'", *script, "END_OF_SCRIPT"])
    return [f"mkdir -p {LOCAL_DIRECTORY}", write, f"sbatch {file}"]


class Cluster(NamedTuple):
    """Describes one kind of cluster: what it needs here, its flags, and the commands for it."""

    programs: tuple[str, ...]  # that must be installed here
    required: tuple[str, ...]  # flags
    optional: tuple[str, ...]  # flags
    longest_name: int
    commands: Callable[..., list[str]]


CLUSTERS = {
    "tpu": Cluster(("gcloud", "git"), ("name", "zone"), ("project",), 63, tpu),
    "gke": Cluster(
        ("xpk", "git", "kubectl"),
        ("name", "cluster"),
        ("zone", "project", "tpu_type", "slices", "base_image", "docker_image"),
        40,
        gke,
    ),
    "slurm": Cluster(("sbatch",), ("name",), ("nodes", "gpus", "sbatch"), 63, slurm),
}
