"""Sampler and trainer are compared in every step of a run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from errors import UserError
from launch import reinforce
from rl.engine import Engine
from tests.launch.documented_metrics import check_documented
from tests.launch.test_reinforce import (
    in_a_place_with_rewards,  # noqa: F401, a fixture that every test has
    lines,
    run_of,
)

pytestmark = pytest.mark.command


def test_sampler_and_trainer_are_compared_in_every_step():
    """Choices in every layer that makes any, and the canary; with nothing kept and old log-probs of
    the trainer, so that the first ratio is 1 where there is but one update.
    """
    changes = {"train__stage": "sparse", "sampling__attention": "sparse", "train__steps": 2}
    changes |= {"reinforce__keep_selection": False, "reinforce__old_logprobs": "trainer"}
    config = run_of("length", **changes)
    reinforce.run(config, Path("run"))
    check_documented("run", "sparse", "keys compared")
    for line in lines("run"):
        compared = {name: value for name, value in line.items() if name.startswith("sampling/")}
        assert compared.keys() == {
            *(f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max")),
            *(f"sampling/importance_sampling_ratio/{name}" for name in ("min", "mean", "max")),
            "sampling/canary_gap",
            *(f"sampling/selected_jaccard{layer}" for layer in ("", "_0", "_1")),
            *(f"sampling/routes_jaccard{layer}" for layer in ("", "_1")),
        }
        assert compared["sampling/canary_gap"] < 1e-5
        jaccards = [value for name, value in compared.items() if "jaccard" in name]
        assert min(jaccards) > 0.99 and max(jaccards) <= 1
        assert line["ratio/mean"] == 1 and line["ppo_kl"] == 0
        assert line["clip_ratio/region_mean"] == 0
        assert line["indexer_grad_norm"] > 0, "by default it learns"


def test_a_run_stops_where_the_sampler_keeps_old_weights(monkeypatch):
    """The weights of the first step's update never arrive; that step can be gone on from."""
    load, given = Engine.load, []

    def stale(engine, variables, *args, **options):
        given.append(jax.tree.map(jnp.copy, variables))
        load(engine, given[-1 if len(given) < 3 else 0], *args, **options)

    monkeypatch.setattr(Engine, "load", stale)
    with pytest.raises(UserError, match=r"step 2: sampler and trainer do not have the same policy"):
        reinforce.run(run_of("length", train__warmup_steps=0), Path("run"))
    assert [line["step"] for line in lines("run")] == [1]
