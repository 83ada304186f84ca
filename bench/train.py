"""Measures one optimizer step on configs/tiny_dsv3.py: 8 x 256 tokens, float32, median of 10.

    python -m bench.train

Compilation is not in the time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bench.workload import print_result, random_tokens, seconds, tiny_dsv3_config
from experiment.command_line import command
from experiment.schema import Config
from model.sharding import make_mesh
from model.transformer import boxed_shapes
from train.objective import language_objective
from train.optimizer import make_optimizer
from train.state import fresh_state
from train.step import make_step


def train_action(config: Config) -> Callable[[int], dict]:
    """Returns what trains on a batch of random tokens and keeps the state; run it under a mesh."""
    model, train = config.model, config.train
    optimizer = make_optimizer(train, boxed_shapes(model)["params"])
    B, T = config.data.batch_size, config.data.seq_len
    state = fresh_state(model, optimizer, make_mesh(config.mesh), jax.random.key(0))
    step = make_step(model, train, language_objective(model, train), optimizer)
    step_fn = jax.jit(step, donate_argnums=0)
    ones_BT = jnp.ones((B, T))
    one_document = {
        "positions": jnp.broadcast_to(jnp.arange(T), (B, T)),
        "segments": ones_BT.astype(jnp.int32),
        "weights": ones_BT,
    }

    def action(repeat: int) -> dict:
        nonlocal state
        # The two warm-up calls are numbers -2 and -1, and a seed may not be negative.
        tokens_BT = jnp.asarray(random_tokens(repeat + 2, B, T, model.vocab_size))
        state, metrics = step_fn(state, {"tokens": tokens_BT} | one_document)
        return metrics

    return action


def main() -> None:
    """Trains on random tokens and prints the speed."""
    config = tiny_dsv3_config()
    with jax.set_mesh(make_mesh(config.mesh)):
        tokens = config.data.batch_size * config.data.seq_len
        print_result("train", config, seconds(train_action(config)), tokens)


if __name__ == "__main__":
    command(main, config="none", workdir=False)
