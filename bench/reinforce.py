"""Measures a GRPO step on configs/tiny_dsv3.py: 8 prompts of 32 tokens, 8 completions of 64 each.

    python -m bench.reinforce

In float32, median of 10, also of sampling and update alone; compilation is not in the time.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bench.workload import print_result, random_prompts, seconds, tiny_dsv3_config
from data.tokenizer import Tokenizer
from experiment.command_line import command
from experiment.schema import Config
from model.sharding import make_mesh
from rl.algorithms.spec import get_algorithm
from rl.engine import Engine
from rl.learner import Learner
from rl.pay import Rewards
from rl.trajectory import batch_of
from train.setup import Setup
from train.state import fresh_state


class Steps:
    """Takes GRPO steps on random prompts, and keeps the seconds of each half of a step.

    The reward of a completion is the mean of its token ids over the size of the vocabulary.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.config = config
        self.sample_seconds: list[float] = []
        self.update_seconds: list[float] = []
        reinforce, sampling = config.reinforce, config.sampling
        self.algorithm = get_algorithm(
            reinforce.algorithm,
            max_completion=sampling.max_new_tokens,
            kl_weight=reinforce.kl_weight,
        )
        prompts = reinforce.prompts_per_step
        self._engine = Engine(
            config.model,
            mesh,
            sampling,
            rows=prompts * reinforce.group_size,
            group_size=reinforce.group_size,
        )
        setup = Setup(config.model, Tokenizer.__new__(Tokenizer), mesh)  # nothing is written
        self._learn = Learner(setup, config.train, sampling, reinforce, self.algorithm, seed=0)
        self.state = fresh_state(config.model, self._learn.optimizer, mesh, jax.random.key(0))

    def take(self, repeat: int):
        """Samples, updates, and returns the metrics. Calls before number 0 are not recorded."""
        model, sampling = self.config.model, self.config.sampling
        group, prompts = self.config.reinforce.group_size, self.config.reinforce.prompts_per_step
        began = time.perf_counter()
        # The two warm-up calls are numbers -2 and -1, and a seed may not be negative.
        asked = random_prompts(repeat + 2, prompts, model, sampling, group)
        with self._engine.loaded(self.state.variables):
            ended = self._engine.run(asked)
            trajectories = sorted(ended, key=lambda each: (each.group, each.sample))
        sampled = time.perf_counter()
        batch = jax.tree.map(jnp.asarray, batch_of(trajectories, self._engine.capacity, 0))
        means = [float(each.completion.mean()) / model.vocab_size for each in trajectories]
        paid_MPG = np.asarray(means, np.float32).reshape(1, prompts, group)
        rewards = Rewards(("mean",), np.ones(1, np.float32), paid_MPG)
        paid = rewards.arrays(prompts * group)
        self.state, (metrics,) = self._learn(self.state, None, batch, paid, repeat + 3)
        jax.block_until_ready(metrics)
        if repeat >= 0:
            self.sample_seconds.append(sampled - began)
            self.update_seconds.append(time.perf_counter() - sampled)
        return metrics


def main() -> None:
    """Takes the steps and prints their speed."""
    config = tiny_dsv3_config("sampling.max_new_tokens=64", "train.mtp_weight=0.0")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        steps = Steps(config, mesh)
        times = seconds(steps.take)
    completions = config.reinforce.prompts_per_step * config.reinforce.group_size
    print_result(
        "reinforce",
        config,
        times,
        completions * config.sampling.max_new_tokens,
        sample_seconds=round(statistics.median(steps.sample_seconds), 4),
        update_seconds=round(statistics.median(steps.update_seconds), 4),
    )


if __name__ == "__main__":
    command(main, config="none", workdir=False)
