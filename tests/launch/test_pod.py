"""pod runs what it prints, and the words a person typed arrive on every host unharmed.

gcloud, xpk and sbatch are played by a few lines of shell.
"""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from experiment.clusters import CLUSTERS
from experiment.command_line import command
from launch.pod import FLAGS, run

pytestmark = pytest.mark.command

WORDS = [
    "python",
    "-m",
    "launch.pretrain",
    "--config.data.sources=('text:a b/*.py', \"it's\")",
    "--workdir=/mnt/$HOME x",
    "--x=a&b;c`d`",
]

TPU = ["--on=tpu", "--name=slice", "--zone=z"]
GKE = ["--on=gke", "--name=job", "--cluster=c", "--tpu_type=v5litepod-64"]
SLURM = ["--on=slurm", "--name=job"]
ON = {"tpu": (TPU, 2), "gke": (GKE, 1), "slurm": (SLURM, 1)}  # and on how many hosts


def call(argv):
    try:
        command(run, config="none", workdir=False, flags=FLAGS, rest="words", argv=argv)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository with a committed, a changed, a deleted, a new and an ignored file, and programs
    that play the cluster's.
    """
    tree = tmp_path / "tree"
    tree.mkdir()
    monkeypatch.chdir(tree)
    for name in ("kept", "changed", "deleted"):
        Path(name).write_text("old")
    Path(".gitignore").write_text("runs/\nignored\n")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-c", "init.defaultBranch=main"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    Path("changed").write_text("new")
    Path("new").write_text("new")
    Path("ignored").write_text("")
    Path("deleted").unlink()

    programs = {
        # Two hosts, each with a home directory of its own.
        "gcloud": """
            [ "$1 $2 $3" = "compute tpus tpu-vm" ] || exit 9
            case $4 in
            scp) for host in 0 1; do cp "$5" "$HOSTS/$host/${6#*:}"; done;;
            ssh) for word in "$@"; do [[ $word == --command=* ]] && script=${word#--command=}; done
                 for host in 0 1; do
                   (cd "$HOSTS/$host" && HOME="$HOSTS/$host" bash -c "$script") || exit 1
                 done;;
            esac""",
        "python3": "exit 0",  # pip and uv: nothing is installed
        "xpk": """
            for word in "$@"; do
              [[ $word == --command=* ]] && script=${word#--command=}
              [[ $word == --script-dir=* ]] && cd "${word#--script-dir=}"
              [[ $word == --env=* ]] && export "${word#--env=}"
            done
            bash -c "$script" """,
        "pip": "exit 0",
        "kubectl": "exit 0",
        "sbatch": 'bash "$1"',
        "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift; "$@"',
        # The command that is started writes down what it sees, in a directory for each host, which
        # gets its name only when it is whole; hosts run side by side.
        "python": """
            one=$(mktemp -d "$SEEN/.XXXXXX")
            printf '%s\\0' "$@" > "$one/words"
            echo "$ATHANOR_DISTRIBUTED" > "$one/distributed"; pwd > "$one/where"
            mv "$one" "$SEEN/${one##*.}" """,
        "patient": "echo working; exec sleep 600",
    }
    (tmp_path / "bin").mkdir()
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for host in "01":
        (tmp_path / "hosts" / host).mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("HOSTS", f"{tmp_path}/hosts")
    (tmp_path / "seen").mkdir()
    monkeypatch.setenv("SEEN", f"{tmp_path}/seen")
    return tmp_path


def git_status() -> str:
    argv = ["git", "status", "--porcelain"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def started(place):
    return [one for one in (place / "seen").iterdir() if not one.name.startswith(".")]


def wait_until(true):
    deadline = time.monotonic() + 120
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)


def arrived(place, hosts):
    """Where the command was started, on all hosts, with the words it was given there; waited for:
    on a TPU it runs in the background.
    """
    wait_until(lambda: len(started(place)) >= hosts)
    seen = started(place)
    assert len(seen) == hosts
    for one in seen:
        assert ["python", *(one / "words").read_text().split("\0")[:-1]] == WORDS
        assert (one / "distributed").read_text() == "1\n"
    return {Path((one / "where").read_text().strip()) for one in seen}


@pytest.mark.parametrize("argv, hosts", ON.values(), ids=ON)
def test_every_word_arrives(place, argv, hosts):
    assert call([*argv, "--", *WORDS]) == 0
    arrived(place, hosts)


@pytest.mark.parametrize("argv, hosts", [ON["tpu"], ON["gke"]], ids=["tpu", "gke"])
def test_the_tree_that_arrives_is_the_one_here(place, argv, hosts):
    before = git_status()
    assert call([*argv, "--", *WORDS]) == 0
    places = arrived(place, hosts)
    assert len(places) == hosts
    for there in places:
        assert set(os.listdir(there)) - {"pod.log", "pod.pid"} == {
            ".gitignore",
            "kept",
            "changed",
            "new",
        }
        assert (there / "changed").read_text() == "new"
    assert git_status() == before, "nothing was staged"


@pytest.mark.parametrize("argv, hosts", ON.values(), ids=ON)
def test_a_dry_run_prints_what_would_run_and_runs_nothing(place, argv, hosts, capsys):
    assert call([*argv, "--dry_run", "--", *WORDS]) == 0
    out = capsys.readouterr().out
    assert not Path("runs").exists() and not started(place)
    # Pasted, it does the same.
    subprocess.run(["bash", "-e", "-c", out], check=True, capture_output=True)
    arrived(place, hosts)


def test_a_tpu_run_goes_on_until_stopped(place, capfd):
    assert call([*TPU, "--", "patient"]) == 0
    wait_until(
        lambda: (
            [log.read_text() for log in place.glob("hosts/*/athanor/pod.log")] == ["working\n"] * 2
        )
    )
    assert call([*TPU, "--action=status"]) == 0
    assert capfd.readouterr().out.count(": running\nworking\n") == 2
    assert call([*TPU, "--", "patient"]) == 2
    assert "a run is going on here" in capfd.readouterr().out
    assert call([*TPU, "--action=stop"]) == 0
    wait_until(
        lambda: call([*TPU, "--action=status"]) == 0 and "running" not in capfd.readouterr().out
    )
    assert call([*TPU, "--action=status"]) == 0
    assert capfd.readouterr().out.count(": ended\n") == 2


def test_a_failing_step_stops_the_rest(place, capfd):
    (place / "bin/pip").write_text("#!/bin/bash\nexit 7\n")
    assert call([*GKE, "--", *WORDS]) == 2
    err = capfd.readouterr().err
    assert "error: exit 7 from: xpk workload create" in err
    assert err.rstrip().splitlines()[-1].startswith("error: ")
    assert not started(place)


def test_slurm_starts_a_process_per_gpu_which_sees_all_of_them(capsys):
    argv = [
        *SLURM,
        "--nodes=4",
        "--gpus=8",
        "--sbatch=--partition=big",
        "--sbatch=--time=24:00:00",
        "--dry_run",
        "--",
        "python",
    ]
    assert call(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for option in (
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--partition=big",
        "--time=24:00:00",
        "--signal=TERM@120",
    ):
        assert f"#SBATCH {option}" in lines
    # JAX numbers the GPUs of a machine itself.
    assert not any("gpus-per-task" in line for line in lines)


def test_gke_with_an_image_of_ones_own_copies_no_tree(capsys):
    assert (
        call([*GKE, "--docker_image=i", "--slices=2", "--dry_run", "--", "python", "-m", "x"]) == 0
    )
    assert capsys.readouterr().out == (
        "xpk workload create --cluster=c --workload=job --tpu-type=v5litepod-64 --num-slices=2 "
        "--env=ATHANOR_DISTRIBUTED=1 --docker-image=i '--command=python -m x'\n"
    )


@pytest.mark.parametrize(
    "argv, out",
    [
        (
            [*TPU, "--action=logs"],
            "gcloud compute tpus tpu-vm ssh slice --worker=0 --zone=z "
            "'--command=tail -n 200 -F athanor/pod.log'",
        ),
        (
            ["--on=gke", "--name=job", "--cluster=c", "--action=status"],
            "xpk workload list --cluster=c --filter-by-job=job",
        ),
        (
            ["--on=gke", "--name=job", "--cluster=c", "--action=stop"],
            "xpk workload delete --cluster=c --workload=job",
        ),
        ([*SLURM, "--action=status"], "squeue --me --name=job"),
        ([*SLURM, "--action=stop"], "scancel --me --name=job"),
    ],
)
def test_looking_after_a_run(argv, out, capsys):
    assert call([*argv, "--dry_run"]) == 0
    assert capsys.readouterr().out == out + "\n"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--on=tpu --name=a -- x", "--zone is missing"),
        ("--on=tpu --zone=z -- x", "--name is missing"),
        ("--on=gke --name=a -- x", "--cluster is missing"),
        ("--on=gke --name=a --cluster=c -- x", "--tpu_type is missing"),
        (
            "--on=gke --name=a --cluster=c --tpu_type=t --base_image=i --docker_image=j -- x",
            "give one of them",
        ),
        ("--on=slurm --name=a --zone=z -- x", "--zone: not used with --on=slurm"),
        ("--on=tpu --name=a --zone=z --nodes=2 -- x", "--nodes: not used with --on=tpu"),
        ("--on=slurm --name=a --nodes=0 -- x", "at least one machine"),
        ("--on=slurm --name=a;b -- x", "must be lower-case letters"),
        ("--on=gke --cluster=c --tpu_type=t --name=" + "a" * 41 + " -- x", "at most 40"),
        ("--on=slurm --name=a", "what to run is missing"),
        ("--on=slurm --name=a --action=stop -- x", "drop what stands after --"),
        ("--on=borg --name=a -- x", "--on=borg"),
        ("--on=slurm --name=a --config.train.steps=3 -- x", "takes no --config"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    flags, dashes, rest = words.partition(" -- ")
    assert call([*flags.split(), "--dry_run", *dashes.split(), *rest.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("on", CLUSTERS)
def test_a_missing_program_is_one_line_and_nothing_runs(on, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    argv = {"tpu": TPU, "gke": GKE, "slurm": SLURM}[on]
    assert call([*argv, "--", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {CLUSTERS[on].programs[0]}: not installed here")
    assert err.count("\n") == 1
    assert json.dumps(os.listdir(tmp_path)) == "[]"
