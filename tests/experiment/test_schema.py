"""The door lets exactly the right configs in, and speaks in one line about the others."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base
from errors import UserError
from experiment import schema
from experiment.command_line import Flag, command
from experiment.config_files import with_overrides
from tests.ports import free_address

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Inner:
    experts: int
    rate: float


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    on: bool
    sizes: tuple[float, ...]
    limit: int | None
    inner: Inner


def section(**changes) -> ConfigDict:
    return ConfigDict(
        {
            "name": "a",
            "on": True,
            "sizes": (1, 2.5),
            "limit": None,
            "inner": {"experts": 8, "rate": 1},
        }
        | changes
    )


# ---- build: fields match both ways, types are the annotated ones


def test_build_makes_the_annotated_types():
    built = schema.build(Outer, section(sizes=[1, 2.5]), "config")
    assert built == Outer("a", True, (1.0, 2.5), None, Inner(8, 1.0))
    assert (
        type(built.inner.rate) is float
        and type(built.sizes) is tuple
        and type(built.sizes[0]) is float
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"nam": 1}, 'config.nam: no such field (did you mean "name"?)'),
        (
            {"inner": {"expert": 8, "rate": 1.0}},
            'config.inner.expert: no such field (did you mean "experts"?)',
        ),
        ({"inner": {"zzz": 8}}, "config.inner.zzz: no such field (has: experts, rate)"),
        (
            {"inner": {"experts": 8}},
            "config.inner.rate: missing (configs/base.py says what it means)",
        ),
        ({"inner": 3}, "config.inner = 3: must be a section with the fields experts, rate"),
        (
            {"inner": {"experts": "many", "rate": 1.0}},
            "config.inner.experts = 'many': must be an int",
        ),
        ({"inner": {"experts": 1.0, "rate": 1.0}}, "config.inner.experts = 1.0: must be an int"),
        ({"inner": {"experts": True, "rate": 1.0}}, "config.inner.experts = True: must be an int"),
        ({"inner": {"experts": 1, "rate": True}}, "config.inner.rate = True: must be a float"),
        ({"on": 1}, "config.on = 1: must be a bool"),
        ({"sizes": (1.0, "x")}, "config.sizes[1] = 'x': must be a float"),
        ({"sizes": "12"}, "config.sizes = '12': must be a tuple, such as \"('a', 'b')\""),
        ({"limit": "x"}, "config.limit = 'x': must be an int"),
    ],
)
def test_build_names_the_field_and_what_it_must_be(changes, message):
    with pytest.raises(UserError) as error:
        schema.build(Outer, section(**changes), "config")
    assert str(error.value) == message


# ---- parse: the schema and the dataclasses are one


def test_the_schema_parses_and_nothing_is_lost():
    written = base.get_config()
    parsed = dataclasses.asdict(schema.parse(written))
    assert parsed == written.to_dict()


@pytest.mark.parametrize(
    "override, words",
    [
        (
            "--config.train.microbatches=3",
            "train.microbatches = 3: does not divide data.batch_size = 8",
        ),
        ("--config.model.moe.n_group=3", "model.moe.n_group = 3"),
        (
            "--config.tokenizer.path=tok.json",
            'tokenizer.path = .tok.json.: needs tokenizer.kind = "file"',
        ),
    ],
)
def test_parse_refuses_what_does_not_fit_together(override, words):
    with pytest.raises(UserError, match=words):
        schema.parse(with_overrides(base.get_config(), [override]))


def test_an_indexer_stage_needs_an_indexer():
    with pytest.raises(UserError, match="needs an indexer"):
        schema.parse(
            with_overrides(
                base.get_config(),
                ["--config.train.stage=sparse", "--config.model.indexer.n_heads=0"],
            )
        )


# ---- overrides


@pytest.mark.parametrize(
    "words, sources",
    [
        (["--config.data.sources=('text:src/**/*.py',)"], ("text:src/**/*.py",)),
        (["--config.data.sources=text:src/**/*.py"], ("text:src/**/*.py",)),
        (
            ["--config.data.sources=('jsonl:a b.gz#text', 'stdlib')"],
            ("jsonl:a b.gz#text", "stdlib"),
        ),
        (["--config.data.sources=stdlib", "--config.data.sources=text:b"], ("stdlib", "text:b")),
    ],
)
def test_tuples_can_be_overridden(words, sources):
    assert with_overrides(base.get_config(), words).data.sources == sources


def test_overrides_are_read_by_the_type_of_the_field():
    words = [
        "--config.train.learning_rate=1",
        "--config.model.tie_word_embeddings",
        "--config.data.cross_document_attention=false",
        "--config.init_from=7",
    ]
    config = with_overrides(base.get_config(), words)
    assert config.train.learning_rate == 1.0 and type(config.train.learning_rate) is float
    assert (
        config.model.tie_word_embeddings is True and config.data.cross_document_attention is False
    )
    assert config.init_from == "7"


# ---- command: 0, 2, 130; one line


def call(argv, run=lambda **_: None, **options):
    """The exit code of `command` for these words, 0 where it returns."""
    try:
        command(run, argv=argv, **options)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def files(tmp_path):
    bodies = {
        "good": "from configs.base import get_config",
        "raises": "from configs import base\n\ndef get_config():\n    c = base.get_config()\n    c.model.hidden_size = wide\n    return c",
        "typo": "from configs import base\n\ndef get_config():\n    c = base.get_config()\n    c.model.widht = 3\n    return c",
        "broken": "def get_config(:\n",
        "empty": "",
        "nothing": "def get_config():\n    pass",
        "argument": "from configs import base\ndef get_config(size):\n    c = base.get_config()\n    c.model.hidden_size = int(size)\n    return c",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(body)
    (tmp_path / "file").write_text("")
    return tmp_path


MISTAKES = {  # the words -> what the line must say
    "--workdir=W": "--config is missing",
    "--config=F/good.py": "--workdir is missing",
    "--config=F/god.py --workdir=W": "no such file",
    "--config=F/file --workdir=W": "must be a Python file",
    "--config=F/raises.py --workdir=W": "raises.py:5: NameError: name 'wide' is not defined",
    "--config=F/typo.py --workdir=W": 'typo.py: config.model.widht: no such field (did you mean "width"?)',
    "--config=F/broken.py --workdir=W": "broken.py:1: SyntaxError",
    "--config=F/empty.py --workdir=W": "defines no get_config()",
    "--config=F/nothing.py --workdir=W": "must return a ConfigDict, not NoneType",
    "--config=F/argument.py --workdir=W": "TypeError",
    "--config=F/argument.py:x --workdir=W": "argument.py:4: ValueError",
    "--config=F/good.py --workdir=W --stpes=3": "Unknown command line flag 'stpes'",
    "--config=F/good.py --workdir=W --samples=x": "--samples=x",
    "--config=F/good.py --workdir=W --mode=x": "--mode=x",
    "--config=F/good.py --workdir=W stray": "stray: not expected",
    "--config=F/good.py --workdir=F/file": "is a file",
    "--config=F/good.py --workdir=gs://bucket/run": "mount the bucket",
    "--config=F/good.py --workdir=W --pretend_devices=-1": "must be positive",
    "--config=F/good.py --workdir=W --config.model.moe.expert=3": 'config.model.moe.expert: no such field (did you mean "experts"?)',
    "--config=F/good.py --workdir=W --config.modle.moe.experts=3": 'config.modle: no such field (did you mean "model"?)',
    "--config=F/good.py --workdir=W --config.seed.x=3": "config.seed.x: no such field (config.seed is 0, not a section)",
    "--config=F/good.py --workdir=W --config.train.steps=many": "config.train.steps = 'many': must be an int",
    "--config=F/good.py --workdir=W --config.train.steps": "needs a value: --config.train.steps=VALUE",
    "--config=F/good.py --workdir=W --config.train.steps=1e3": "config.train.steps = '1e3': must be an int",
    "--config=F/good.py --workdir=W --config.data.mixture=(0.5,": "config.data.mixture = '(0.5,': must be a tuple",
    "--config=F/good.py --workdir=W --config.model.tie_word_embeddings=perhaps": "config.model.tie_word_embeddings = 'perhaps': must be a bool",
    "--config=F/good.py --workdir=W --config.model=3": "config.model",
    "--config=F/good.py --workdir=W --config.model.moe.n_group=3": "good.py: model.moe.n_group = 3",
}


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
    assert capsys.readouterr().err == "interrupted\n"


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
    config = schema.parse(with_overrides(base.get_config(), ["--config.model.hidden_size=48"]))
    schema.claim(tmp_path / "run", config, "pretrain")
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


def test_help_is_short_quick_and_exits_0():
    """Quick because it imports neither JAX nor anything that does."""
    script = (
        "'''Demo.\n\n    python -m launch.demo\n\nMore.\n'''\nimport sys\nfrom launch.command import command, Flag\n"
        "def run(config, workdir, n): pass\n"
        "try: command(run, flags={'n': Flag(3, 'how many')})\nfinally: assert 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Demo.\n\n    python -m launch.demo\n\nMore.\n\nflags:\n")
    assert (
        "--config=" in done.stdout and "--n=N" in done.stdout and len(done.stdout.splitlines()) < 13
    )


def test_pretended_devices_replace_those_of_the_environment():
    """In a process of its own, as JAX reads the number once."""
    script = (
        "import jax\nfrom launch.command import command\n"
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


def test_two_processes_join():
    """Over a local port, as launch/pod.py starts them on two hosts."""
    script = (
        "import jax\nfrom launch.command import command\n"
        "def run(config): print(jax.process_count(), jax.device_count(), flush=True)\n"
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
    assert [process.communicate(timeout=300)[0].split() for process in processes] == [
        ["2", "4"]
    ] * 2


def test_processes_that_cannot_find_each_other_are_one_line(monkeypatch, capsys):
    monkeypatch.setenv("ATHANOR_DISTRIBUTED", "nowhere")
    assert call(["--config=configs/base.py"], workdir=False) == 2
    assert "ATHANOR_DISTRIBUTED=nowhere" in capsys.readouterr().err


# ---- claim


@pytest.fixture(scope="module")
def config():
    return schema.parse(base.get_config())


def changed(*words):
    return schema.parse(with_overrides(base.get_config(), [f"--config.{word}" for word in words]))


def test_claim_writes_once_and_lets_the_same_config_in(tmp_path, config):
    schema.claim(tmp_path / "run", config, "pretrain")
    before = (tmp_path / "run/config.json").read_text()
    schema.claim(tmp_path / "run", config, "pretrain")
    assert (tmp_path / "run/config.json").read_text() == before
    assert os.listdir(tmp_path / "run") == ["config.json"]
    assert schema.parse(schema.recorded(tmp_path / "run")) == config


def test_claim_names_the_first_difference(tmp_path, config):
    schema.claim(tmp_path, config, "pretrain")
    with pytest.raises(UserError) as error:
        schema.claim(tmp_path, changed("train.learning_rate=0.003", "train.beta1=0.8"), "pretrain")
    assert (
        str(error.value)
        == f"{tmp_path} belongs to another config (train.learning_rate: 0.001 there, 0.003 here); choose another --workdir"
    )
    assert schema.parse(schema.recorded(tmp_path)) == config


def test_claim_refuses_another_command(tmp_path, config):
    schema.claim(tmp_path, config, "pretrain")
    with pytest.raises(UserError, match=r"belongs to launch\.pretrain"):
        schema.claim(tmp_path, config, "reinforce")


@pytest.mark.parametrize("lines, free", [(None, True), ("", True), ('{"step": 1}\n', False)])
def test_a_run_that_did_not_begin_leaves_the_directory_free(tmp_path, config, lines, free):
    """Its person mends the config and gives the command again; what a run has recorded stays its
    own.
    """
    with (
        pytest.raises(UserError, match="no such file"),
        schema.claimed(tmp_path, config, "pretrain"),
    ):
        (tmp_path / "tokenizer.json").write_text("{}")
        if lines is not None:
            (tmp_path / "metrics.jsonl").write_text(lines)
        raise UserError("no such file")
    assert (
        (tmp_path / "config.json").exists() is (tmp_path / "tokenizer.json").exists() is (not free)
    )


def test_a_failed_try_to_go_on_takes_nothing_away(tmp_path, config):
    schema.claim(tmp_path, config, "pretrain")
    with pytest.raises(UserError), schema.claimed(tmp_path, config, "pretrain"):
        raise UserError("no such file")
    assert schema.parse(schema.recorded(tmp_path)) == config


def test_claim_lets_a_run_be_extended_and_moved(tmp_path, config):
    schema.claim(tmp_path, config, "pretrain")
    longer = changed("train.steps=5000", "train.log_every=1", "mesh.fsdp=2", "train.microbatches=2")
    schema.claim(tmp_path, longer, "pretrain")
    assert schema.parse(schema.recorded(tmp_path)) == longer


def test_may_change_names_fields_that_exist(config):
    fields = schema._flat(json.loads(json.dumps(dataclasses.asdict(config))))
    assert set(schema.MAY_CHANGE) <= set(fields)


def test_claim_refuses_a_damaged_record(tmp_path, config):
    (tmp_path / "config.json").write_text('{"command": ')
    with pytest.raises(UserError, match="not the record of a run"):
        schema.claim(tmp_path, config, "pretrain")


def test_summary_names_parameters_and_mesh(capsys, config):
    from model.sharding import make_mesh

    schema.summarise(config, 12_345, 6_789, make_mesh(config.mesh), trains=True)
    out = capsys.readouterr().out
    assert (
        "12,345 total, 6,789 active" in out
        and "data=8 fsdp=1 expert=1 tensor=1: 8 cpu devices" in out
    )
    assert "8 x 256 = 2,048 tokens a step" in out and len(out.splitlines()) == 5
