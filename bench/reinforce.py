"""One GRPO step on tiny-dsv3: 8 prompts of 32 tokens x 8 completions x 64 tokens, float32, after
compilation, median of 10; sampling and update apart.

python -m bench.reinforce
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from bench.workload import print_result, random_tokens, seconds, workload
from experiment.command_line import command
from model.sharding import make_mesh
from rl.algorithms import get_algorithm
from rl.objective import policy_objective
from rl.rollout import policy_batch
from rl.sampler import sample
from train.optimizer import make_optimizer
from train.state import fresh_state
from train.step import make_step


def main() -> None:
    config = workload(sampling__max_new=64, train__mtp_weight=0.0)
    r, new, prompt = (
        config.reinforce,
        config.sampling.max_new_tokens,
        config.sampling.max_prompt_tokens,
    )
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.train)
    algorithm = get_algorithm(r.algorithm, max_completion=new, kl_weight=r.kl_weight)
    with jax.set_mesh(mesh):
        state = fresh_state(config.model, optimizer, mesh, jax.random.key(0))
        sample_fn = jax.jit(
            functools.partial(sample, config.model, config.sampling, (), 0, group=r.group_size)
        )
        step_fn = jax.jit(
            make_step(
                config.model,
                config.train,
                policy_objective(config.model, config.train, algorithm, 1.0),
                optimizer,
            ),
            donate_argnums=0,
        )
        segments = jnp.ones((r.prompts_per_step, prompt), jnp.int32)
        sampling, updating = [], []

        def action(repeat: int):
            nonlocal state
            began = time.perf_counter()
            prompts = jnp.asarray(
                random_tokens(repeat + 2, r.prompts_per_step, prompt, config.model.vocab_size)
            )
            completions = jax.block_until_ready(
                sample_fn(state.variables, prompts, segments, jax.random.key(repeat + 2))
            )
            sampled = time.perf_counter()
            batch = policy_batch(prompts, segments, completions, r.group_size)
            rewards_PG = jnp.asarray(
                np.asarray(completions.tokens_BC)
                .reshape(r.prompts_per_step, r.group_size, new)
                .mean(axis=-1)
                / config.model.vocab_size
            )
            batch["advantages"] = jnp.where(
                batch["mask"], algorithm.advantage(rewards_PG).reshape(-1)[:, None], 0.0
            )
            batch["old_logprobs"] = batch["sampler_logprobs"]
            state, metrics = step_fn(state, batch)
            jax.block_until_ready(metrics)
            if repeat >= 0:
                sampling.append(sampled - began)
                updating.append(time.perf_counter() - sampled)
            return metrics

        times = seconds(action)
        parts = {
            "sample_seconds": round(statistics.median(sampling), 4),
            "update_seconds": round(statistics.median(updating), 4),
        }
        print_result("reinforce", config, times, r.prompts_per_step * r.group_size * new, **parts)


if __name__ == "__main__":
    command(main, config="none", workdir=False)
