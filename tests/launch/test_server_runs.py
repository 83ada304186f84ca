"""launch.reinforce with another engine: it learns, dies with its server, and goes on."""

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from data.tokenizer_files import load_tokenizer
from data.tokenizer_training import bytes_tokenizer
from errors import UserError
from experiment.command_line import command
from experiment.schema import Config
from launch import reinforce
from model.mesh import MeshConfig
from model.sharding import make_mesh
from rl.rewards import get_reward
from rl.sampler import Sampler
from rl.servers import server as server_module
from tests.launch.test_bring_a_checkpoint import configured
from tests.launch.test_reinforce import lines, on_devices
from tests.launch.test_training_commands import final_variables
from tests.model_server import ModelServer
from tests.ports import free_address
from tests.tiny_checkpoint import MODEL, write_checkpoint, write_tokenizer

pytestmark = pytest.mark.command

MESH = make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
REWARD = """
def low(text, problem):
    return sum(byte < 100 for byte in text.encode()) / 8
"""


@pytest.fixture
def served(tmp_path, monkeypatch) -> Iterator[ModelServer]:
    """A server of a checkpoint from which runs begin, in a directory with a reward."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.01)
    on_devices(1, monkeypatch)
    Path("own.py").write_text(REWARD)
    get_reward.cache_clear()
    origin = write_checkpoint(tmp_path / "brought", eos_token_id=257)
    write_tokenizer(origin)
    sampling = configured(f"hf:{origin}", **SIZES).sampling
    made = ModelServer("vllm", origin, MODEL, MESH, load_tokenizer(origin), sampling, rows=8)
    made.port = PORT
    with made.running():
        yield made


# At the same port, and all else alike, so that the runs here share programs.
PORT = int(free_address().rpartition(":")[2])
SIZES = {"sampling__max_new_tokens": 8, "sampling__max_prompt_tokens": 168}


def run_of(served: ModelServer, **changes) -> Config:
    """A run that pays for bytes below 100, by this server; in float32 little rounds."""
    own = {
        "reinforce__rewards": {"own.py:low": 1.0},
        "evaluate__reward": "own.py:low",
        "reinforce__group_size": 4,
        "reinforce__canary_tolerance": 1e-4,
        "train__learning_rate": 2e-2,
        "train__steps": 5,
        "sampling__server": served.url,
        "sampling__server_api": served.api,
        "sampling__server_retries": 1,
    }
    return configured(f"hf:{served.origin}", **SIZES | own | changes)


def test_a_run_learns_from_what_a_server_samples(served):
    """Its policy arrives there, before each step, and a held-out evaluation is made by
    it; log-probs differ by rounding, which the metrics say.
    """
    assert reinforce.run(run_of(served, train__eval_every=5), Path("run"))
    found = lines("run")
    rewards = [line["reward"] for line in found]
    assert rewards[-1] > rewards[0] + 0.15, rewards
    assert all(0 <= line["sampling/sampling_logp_difference/max"] < 1e-4 for line in found)
    assert all(line["sampling/canary_gap"] < 1e-5 for line in found)
    (validation,) = lines("run", "validation_pass_at_1")
    assert validation["step"] == 5
    assert len(served.loaded) == len(set(served.loaded)) == 6  # the first policy, and five others
    assert len(list(Path("run/served").iterdir())) == 1


def test_a_server_that_dies_costs_nothing(served):
    """The step that it dies in is done again by the next start, to the bit."""
    config = run_of(served)
    assert reinforce.run(config, Path("whole"))
    served.stop()
    served.start()
    # A probe, a canary and two steps with their canaries come before.
    served.faults.extend([""] * (1 + 1 + 2 * (32 + 1) + 5) + ["die"])
    with pytest.raises(UserError, match=r"2 times in a row .*; step 2 is saved$"):
        reinforce.run(config, Path("parts"))
    served.start()
    assert reinforce.run(config, Path("parts"))
    assert lines("parts") == lines("whole")
    chex.assert_trees_all_equal(
        final_variables(config, Path("parts")), final_variables(config, Path("whole"))
    )


def test_a_server_samples_while_the_trainer_learns(served, monkeypatch):
    """With a lag, in a thread of its own; it samples what it would have in the trainer's."""
    threads, take = set(), Sampler.take

    def noted(sampler, *args):
        threads.add(threading.current_thread().name)
        return take(sampler, *args)

    monkeypatch.setattr(Sampler, "take", noted)
    changes = {"reinforce__lag": 1, "reinforce__algorithm": "cispo", "train__steps": 4}
    changes |= {"train__lora": 2}  # the server has the whole model, with what the adapters add
    assert reinforce.run(run_of(served, **changes), Path("apart"))
    assert {name.rpartition("_")[0] for name in threads} == {"sampler"}
    with monkeypatch.context() as patch:
        patch.setattr("rl.loop.Weights", lambda *args, **options: None)
        assert reinforce.run(run_of(served, **changes), Path("in_turns"))
    assert lines("apart") == lines("in_turns")
    assert [line["sampling/staleness/max"] for line in lines("apart")] == [0, 1, 1, 1]


def test_completions_in_parts(served):
    """By SGLang's words: what is under way when a step ends is ended by the server, and goes on by
    the next policy, as the versions of its tokens say.
    """
    served.api = "sglang"
    served.sampling = dataclasses.replace(served.sampling, max_prompt_tokens=176)
    parts = {
        "reinforce__prompts_per_step": 2,
        "reinforce__prompts_in_flight": 6,
        "reinforce__rollout_tokens": 40,
        "reinforce__trace_completions": -1,
        "sampling__slots": 8,
    }
    assert reinforce.run(run_of(served, **parts), Path("run"))
    assert max(line["sampling/staleness/max"] for line in lines("run")) >= 1
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-4 for line in lines("run"))
    traces = [json.loads(line) for line in Path("run/traces.jsonl").read_text().splitlines()]
    assert any(len(set(each["versions"]) - {-1}) > 1 for each in traces)
    assert served.most <= 8


def test_another_tokenizer_ends_the_command_with_2_and_leaves_nothing(served, capsys):
    served.tokenizer = bytes_tokenizer()
    argv = ["--config=configs/base.py", "--workdir=run", f"--config.init_from=hf:{served.origin}"]
    argv += [f"--config.sampling.server={served.url}", "--config.train.stage=dense"]
    with pytest.raises(SystemExit) as ended:
        command(reinforce.run, argv=argv)
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert len(said) == 1 and "its tokenizer is another than this run's" in said[0]
    assert not Path("run/config.json").exists() and not served.loaded


def test_fields_that_no_server_has_are_one_line(served):
    """Before the workdir is anything's."""
    with pytest.raises(UserError, match=r"sampling\.top_k = 5: .*with a server"):
        reinforce.run(run_of(served, sampling__top_k=5), Path("run"))
    with pytest.raises(UserError, match=r"sampling\.server = 'host:8000': must be 'http"):
        run_of(served, sampling__server="host:8000")
    assert not Path("run").exists()
    assert np.array_equal(served.asked, [])
