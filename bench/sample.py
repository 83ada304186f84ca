"""Measures sampling on configs/tiny_dsv3.py: 16 prompts of 32 tokens, 128 new tokens each.

    python -m bench.sample

In float32, median of 10; compilation is not in the time. The time of prefill counts, its tokens do
not.
"""

import jax
import optax

from bench.workload import print_result, random_prompts, seconds, tiny_dsv3_config
from experiment.command_line import command
from model.sharding import make_mesh
from rl.engine import Engine
from train.state import fresh_state

ROWS = 16


def main() -> None:
    """Samples from random prompts and prints the speed."""
    config = tiny_dsv3_config()
    model, sampling = config.model, config.sampling
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        variables = fresh_state(model, optax.identity(), mesh, jax.random.key(0)).variables
    engine = Engine(model, mesh, sampling, rows=ROWS)

    def action(repeat: int):
        # The two warm-up calls are numbers -2 and -1, and a seed may not be negative. Without a
        # stop token every row goes to the end.
        return list(engine.run(random_prompts(repeat + 2, ROWS, model, sampling)))

    with engine.loaded(variables):
        print_result("sample", config, seconds(action), ROWS * sampling.max_new_tokens)


if __name__ == "__main__":
    command(main, config="none", workdir=False)
