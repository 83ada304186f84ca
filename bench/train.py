"""Training speed on tiny-dsv3: one optimizer step on 8 x 256 tokens, float32, after compilation,
median of 10.

python -m bench.train
"""

import jax
import jax.numpy as jnp

from bench.workload import print_result, random_tokens, seconds, workload
from experiment.command_line import command
from model.sharding import make_mesh
from train.objective import language_objective
from train.optimizer import make_optimizer
from train.state import fresh_state
from train.step import make_step


def main() -> None:
    config = workload()
    optimizer = make_optimizer(config.train)
    mesh = make_mesh(config.mesh)
    B, T = config.data.batch_size, config.data.seq_len
    with jax.set_mesh(mesh):
        state = fresh_state(config.model, optimizer, mesh, jax.random.key(0))
        step_fn = jax.jit(
            make_step(
                config.model,
                config.train,
                language_objective(config.model, config.train),
                optimizer,
            ),
            donate_argnums=0,
        )
        ones = jnp.ones((B, T))
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))

        def action(repeat: int):
            nonlocal state
            tokens = jnp.asarray(random_tokens(repeat + 2, B, T, config.model.vocab_size))
            state, metrics = step_fn(
                state,
                {
                    "tokens": tokens,
                    "positions": positions,
                    "segments": ones.astype(jnp.int32),
                    "weights": ones,
                },
            )
            return metrics

        print_result("train", config, seconds(action), B * T)


if __name__ == "__main__":
    command(main, config="none", workdir=False)
