"""Measures one optimizer step on configs/tiny_dsv3.py: 8 x 256 tokens, float32, median of 10.

    python -m bench.train

Compilation is not in the time.
"""

import jax
import jax.numpy as jnp

from bench.workload import print_result, random_tokens, seconds, tiny_dsv3_config
from experiment.command_line import command
from model.sharding import make_mesh
from model.transformer import boxed_shapes
from train.objective import language_objective
from train.optimizer import make_optimizer
from train.state import fresh_state
from train.step import make_step


def main() -> None:
    """Trains on random tokens and prints the speed."""
    config = tiny_dsv3_config()
    model, train = config.model, config.train
    optimizer = make_optimizer(train, boxed_shapes(model)["params"])
    mesh = make_mesh(config.mesh)
    B, T = config.data.batch_size, config.data.seq_len
    with jax.set_mesh(mesh):
        state = fresh_state(model, optimizer, mesh, jax.random.key(0))
        step = make_step(model, train, language_objective(model, train), optimizer)
        step_fn = jax.jit(step, donate_argnums=0)
        ones_BT = jnp.ones((B, T))
        one_document = {
            "positions": jnp.broadcast_to(jnp.arange(T), (B, T)),
            "segments": ones_BT.astype(jnp.int32),
            "weights": ones_BT,
        }

        def action(repeat: int):
            nonlocal state
            # The two warm-up calls are numbers -2 and -1, and a seed may not be negative.
            tokens_BT = jnp.asarray(random_tokens(repeat + 2, B, T, model.vocab_size))
            state, metrics = step_fn(state, {"tokens": tokens_BT} | one_document)
            return metrics

        print_result("train", config, seconds(action), B * T)


if __name__ == "__main__":
    command(main, config="none", workdir=False)
