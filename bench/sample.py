"""Measures sampling on configs/tiny_dsv3.py: 16 prompts of 32 tokens, 128 new tokens each.

    python -m bench.sample

In float32, median of 10; compilation is not in the time. The time of prefill counts, its tokens do
not.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from bench.workload import print_result, random_tokens, seconds, tiny_dsv3_config
from experiment.command_line import command
from model.sharding import make_mesh
from rl.sampler import keys_of, sample
from train.state import fresh_state

ROWS = 16


def main() -> None:
    """Samples from random prompts and prints the speed."""
    config = tiny_dsv3_config()
    model, sampling = config.model, config.sampling
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        variables = fresh_state(model, optax.identity(), mesh, jax.random.key(0)).variables
        # Without a stop token every row goes to the end.
        sample_fn = jax.jit(functools.partial(sample, model, sampling, (), 0))
        segments = jnp.ones((ROWS, sampling.max_prompt_tokens), jnp.int32)

        def action(repeat: int):
            # The two warm-up calls are numbers -2 and -1, and a seed may not be negative.
            tokens = random_tokens(repeat + 2, ROWS, sampling.max_prompt_tokens, model.vocab_size)
            keys = keys_of(jax.random.key(repeat + 2), range(ROWS))
            return sample_fn(variables, jnp.asarray(tokens), segments, keys)

        print_result("sample", config, seconds(action), ROWS * sampling.max_new_tokens)


if __name__ == "__main__":
    command(main, config="none", workdir=False)
