"""A command parses its words and calls `run`; every mistake is one line and exit code 2."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import base
from errors import UserError
from experiment.command_line import Flag, command
from experiment.config_files import with_overrides
from experiment.schema import parse
from experiment.workdir import record_config
from tests.ports import free_address

ROOT = Path(__file__).parents[2]


def call(argv, run=lambda **_: None, **options):
    """The exit code of `command` for these words, 0 where it returns."""
    try:
        command(run, argv=argv, **options)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def files(tmp_path):
    def changing(line: str, argument: str = "") -> str:
        return (
            f"from configs import base\n\ndef get_config({argument}):\n"
            f"    c = base.get_config()\n    {line}\n    return c"
        )

    bodies = {
        "good": "from configs.base import get_config",
        "raises": changing("c.model.hidden_size = wide"),
        "typo": changing("c.model.hiden_size = 3"),
        "broken": "def get_config(:\n",
        "empty": "",
        "nothing": "def get_config():\n    pass",
        "argument": changing("c.model.hidden_size = int(size)", argument="size"),
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(body)
    (tmp_path / "file").write_text("")
    return tmp_path


# Words after F/good.py and a workdir -> what the line must say.
OVERRIDES = {
    "model.moe.num_expert=3": 'config.model.moe.num_expert: no such field (did you mean "num_exp',
    "modle.moe.num_experts=3": 'config.modle: no such field (did you mean "model"?)',
    "seed.x=3": "config.seed.x: no such field (config.seed is 0, not a section)",
    "train.steps=many": "config.train.steps = 'many': must be an int",
    "train.steps": "needs a value: --config.train.steps=VALUE",
    "train.steps=1e3": "config.train.steps = '1e3': must be an int",
    "data.mixture=(0.5,": "config.data.mixture = '(0.5,': must be a tuple",
    "model.tie_word_embeddings=perhaps": "config.model.tie_word_embeddings = 'perhaps': must be a",
    "model=3": "config.model",
    "model.moe.n_group=3": "good.py: model.moe.n_group = 3",
}
MISTAKES = {  # the words -> what the line must say
    "--workdir=W": "--config is missing",
    "--config=F/good.py": "--workdir is missing",
    "--config=F/god.py --workdir=W": "no such file",
    "--config=F/file --workdir=W": "must be a Python file",
    "--config=F/raises.py --workdir=W": "raises.py:5: NameError: name 'wide' is not defined",
    "--config=F/typo.py --workdir=W": (
        'typo.py: config.model.hiden_size: no such field (did you mean "hidden_size"?)'
    ),
    "--config=F/broken.py --workdir=W": "broken.py:1: SyntaxError",
    "--config=F/empty.py --workdir=W": "defines no get_config()",
    "--config=F/nothing.py --workdir=W": "must return a ConfigDict, not NoneType",
    "--config=F/argument.py --workdir=W": "TypeError",
    "--config=F/argument.py:x --workdir=W": "argument.py:5: ValueError",
    "--config=F/good.py --workdir=W --stpes=3": (
        "--stpes: no such flag (did you mean --config.train.steps?)"
    ),
    "--config=F/good.py --workdir=W --train.lr=3": (
        "--train.lr: no such flag (did you mean --config.train.learning_rate?)"
    ),
    "--config=F/good.py --workdir=W --batch_size=3": "did you mean --config.data.batch_size?",
    "--config=F/good.py --workdri=W": "--workdri: no such flag (did you mean --workdir?)",
    "--config=F/good.py --workdir=W --zzzzz": "--zzzzz: no such flag (see --help)",
    "--config=F/good.py --workdir=W --config.train.lr=3": 'did you mean "learning_rate"?',
    "--config=F/good.py --workdir=W --samples=x": "--samples=x",
    "--config=F/good.py --workdir=W --mode=x": "--mode=x",
    "--config=F/good.py --workdir=W stray": "stray: not expected",
    "--config=F/good.py --workdir=F/file": "is a file",
    "--config=F/good.py --workdir=gs://bucket/run": "mount the bucket",
    "--config=F/good.py --workdir=W --pretend_devices=-1": "must be positive",
    "--config=F/good.py --workdir=W/[a-z]*": "'*' may not be in the path of a workdir",
    "--config=F/good.py --workdir=W/a\\b/c": "may not be in the path of a workdir",
    "--config=F/good.py --workdir=W/x\x01": "'\\x01' may not be in the path of a workdir",
    "--config=F/good.py --workdir=W/x\udcff": "may not be in the path of a workdir",
    f"--config=F/good.py --workdir=W/{'x' * 256}": "File name too long",
} | {f"--config=F/good.py --workdir=W --config.{words}": line for words, line in OVERRIDES.items()}


@pytest.mark.parametrize("words", MISTAKES)
def test_every_mistake_is_one_line_and_exit_2(words, files, capsys):
    ran = []
    argv = words.replace("F/", f"{files}/").replace("=W", f"={files}/run").split()
    code = call(
        argv,
        lambda **_: ran.append(1),
        flags={"samples": Flag(4, "how many"), "mode": Flag("a", "which", ("a", "b"))},
    )
    out, err = capsys.readouterr()
    assert (code, out, ran) == (2, "", [])
    assert err.startswith("error: ") and err.count("\n") == 1 and MISTAKES[words] in err
    assert not (files / "run").exists()


def fail_with(error):
    def run():
        raise error

    return run


def test_a_user_error_in_the_run_is_one_line(capsys):
    assert (
        call(
            [],
            fail_with(UserError("data/a.jsonl:17: no field\nanswer")),
            config="none",
            workdir=False,
        )
        == 2
    )
    assert capsys.readouterr().err == "error: data/a.jsonl:17: no field answer\n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/state"),
        ValueError(f"tensorstore: {os.strerror(errno.ENOSPC)} [path=x]"),
    ],
)
def test_a_full_disk_is_one_line(error, capsys):
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = error
    assert call([], fail_with(wrapped), config="none", workdir=False) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err and err.count("\n") == 1


def test_an_interrupt_exits_130(capsys):
    assert call([], fail_with(KeyboardInterrupt()), config="none", workdir=False) == 130
    assert capsys.readouterr().err == "stopped by SIGINT; give the same command again\n"


@pytest.mark.parametrize("bug", [KeyError("x"), OSError(errno.EIO, "input/output error")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        call([], fail_with(bug), config="none", workdir=False)


def test_run_gets_the_config_the_workdir_and_its_flags(files):
    given = {}
    argv = [
        f"--config={files}/argument.py:48",
        f"--workdir={files}/run",
        "--samples=7",
        "--show=a",
        "--show=b",
        "--config.train.steps=3",
    ]
    assert (
        call(
            argv,
            lambda **kw: given.update(kw),
            flags={"samples": Flag(4, ""), "show": Flag((), "")},
        )
        == 0
    )
    config = given.pop("config")
    assert given == {"workdir": files / "run", "samples": 7, "show": ("a", "b")}
    assert (config.model.hidden_size, config.train.steps) == (48, 3)


def test_rest_is_what_stands_after_the_dashes():
    given = {}
    argv = ["--n=2", "--", "python", "-m", "x", "--config=y", "--help", "--config.train.steps=3"]
    assert (
        call(
            argv,
            lambda **kw: given.update(kw),
            config="none",
            workdir=False,
            flags={"n": Flag(1, "")},
            rest="words",
        )
        == 0
    )
    assert given == {"n": 2, "words": argv[2:]}


def test_a_recorded_config_can_be_overridden(tmp_path, capsys):
    config = parse(with_overrides(base.get_config(), ["--config.model.hidden_size=48"]))
    record_config(tmp_path / "run", config, "pretrain")
    given = {}
    argv = [
        f"--workdir={tmp_path}/run",
        "--config.sampling.temperature=0",
        "--config.data.sources=text:a",
    ]
    assert call(argv, lambda **kw: given.update(kw), config="recorded") == 0
    assert (
        given["config"].model.hidden_size,
        given["config"].sampling.temperature,
        given["config"].data.sources,
    ) == (48, 0.0, ("text:a",))
    assert call([f"--workdir={tmp_path}/nowhere"], config="recorded") == 2
    assert "no config.json" in capsys.readouterr().err


@pytest.mark.command
def test_help_is_short_quick_and_exits_0():
    """Quick because it imports neither JAX nor anything that does."""
    script = (
        "'''Demo.\n\n    python -m launch.demo\n\nMore.\n'''\n"
        "import sys\nfrom experiment.command_line import command, Flag\n"
        "def run(config, workdir, n): pass\n"
        "try: command(run, flags={'n': Flag(3, 'how many')})\n"
        "finally: assert 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Demo.\n\n    python -m launch.demo\n\nMore.\n\nflags:\n")
    lines = done.stdout.splitlines()
    assert "--config=" in done.stdout and "--n=N" in done.stdout
    assert len(lines) < 13 and max(map(len, lines)) < 80


@pytest.mark.command
def test_pretended_devices_replace_those_of_the_environment():
    """In a process of its own, as JAX reads the number once."""
    script = (
        "import jax\nfrom experiment.command_line import command\n"
        "def run(config): print(jax.device_count(), jax.config.jax_platforms)\n"
        "command(run, workdir=False, argv=['--config=configs/base.py', '--pretend_devices=3'])"
    )
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["3", "cpu"]


@pytest.mark.command
def test_two_processes_join():
    """Over a local port, as launch/pod.py starts them on two hosts."""
    script = (
        "import jax\nfrom experiment.command_line import command\n"
        "def run(config): print(f'{jax.process_count()}-of-{jax.device_count()}\\n', flush=True)\n"
        "command(run, workdir=False, argv=['--config=configs/base.py', '--pretend_devices=2'])"
    )
    address = free_address()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=os.environ | {"ATHANOR_DISTRIBUTED": f"{address},{i},2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    # Lines of gloo's come before, after and between.
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert all("2-of-4" in one for one in printed), printed


def test_processes_that_cannot_find_each_other_are_one_line(monkeypatch, capsys):
    monkeypatch.setenv("ATHANOR_DISTRIBUTED", "nowhere")
    assert call(["--config=configs/base.py"], workdir=False) == 2
    assert "ATHANOR_DISTRIBUTED=nowhere" in capsys.readouterr().err


def athanor(*words: str) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "launch", *words]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.command
def test_athanor_lists_the_commands_and_runs_them_by_name():
    listed = athanor("--help").stdout
    assert "\n  pretrain " in listed and "\n  sweep " in listed and "__" not in listed
    helped = athanor("pretrain", "--help")
    assert helped.returncode == 0 and helped.stdout.startswith("Pretrains with fill-in-the-middle")
    assert "--workdir=TEXT" in helped.stdout
    wrong = athanor("pretran")
    assert wrong.returncode == 2
    assert wrong.stderr == 'error: pretran: no such command (did you mean "pretrain"?)\n'
