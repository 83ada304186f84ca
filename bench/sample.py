"""Sampling speed on tiny-dsv3: 16 prompts of 32 tokens, 128 new ones each, float32, after
compilation, median of 10. Prefill is in the time, not in the tokens.

python -m bench.sample
"""

import functools

import jax
import jax.numpy as jnp
import optax

from bench.workload import print_result, random_tokens, seconds, workload
from experiment.command_line import command
from model.sharding import make_mesh
from rl.sampler import sample
from train.state import fresh_state

ROWS = 16


def main() -> None:
    config = workload()
    mesh = make_mesh(config.mesh)
    prompt, new = config.sampling.max_prompt_tokens, config.sampling.max_new_tokens
    with jax.set_mesh(mesh):
        variables = fresh_state(config.model, optax.identity(), mesh, jax.random.key(0)).variables
        sample_fn = jax.jit(
            functools.partial(sample, config.model, config.sampling, (), 0)
        )  # no stop token: every row goes to the end
        segments = jnp.ones((ROWS, prompt), jnp.int32)

        def action(repeat: int):
            return sample_fn(
                variables,
                jnp.asarray(random_tokens(repeat + 2, ROWS, prompt, config.model.vocab_size)),
                segments,
                jax.random.key(repeat + 2),
            )

        print_result("sample", config, seconds(action), ROWS * new)


if __name__ == "__main__":
    command(main, config="none", workdir=False)
