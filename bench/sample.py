"""Measures sampling on tiny-dsv3: 16 prompts of 32 tokens, 128 new ones each, median of 10.

    python -m bench.sample

In float32; compilation is not in the time. Prefill is in the time, not in the tokens.
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
    """Samples from random prompts and prints the speed."""
    config = workload()
    model, sampling = config.model, config.sampling
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        variables = fresh_state(model, optax.identity(), mesh, jax.random.key(0)).variables
        # Without a stop token every row goes to the end.
        sample_fn = jax.jit(functools.partial(sample, model, sampling, (), 0))
        segments = jnp.ones((ROWS, sampling.max_prompt_tokens), jnp.int32)

        def action(repeat: int):
            tokens = random_tokens(repeat + 2, ROWS, sampling.max_prompt_tokens, model.vocab_size)
            return sample_fn(variables, jnp.asarray(tokens), segments, jax.random.key(repeat + 2))

        print_result("sample", config, seconds(action), ROWS * sampling.max_new_tokens)


if __name__ == "__main__":
    command(main, config="none", workdir=False)
