"""Measures sampling with drafts of the MTP modules beside sampling without, in one process.

    python -m bench.speculate

On configs/tiny_dsv3.py with two MTP modules, in float32, after training on a chain: the next token
is a fixed one of the one before, except once in `--noise` times. So drafts are taken about as often
as there is no noise. Both take the same prompts of 32 tokens by turns, one a slot or at least 8,
and sample 128 tokens after each; a ratio is of tokens per second, with drafts to without, and above
1 drafts win. Compilation is in no time. Prints one JSON line for each number of slots, of drafts
and kind of acceptance.
"""

import dataclasses
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bench.workload import machine, random_prompts, tiny_dsv3_config
from experiment.command_line import Flag, command
from experiment.schema import Config
from kernels.device import compiler_options
from model.sharding import make_mesh
from model.transformer import boxed_shapes
from rl.config import DRAFT_ACCEPTANCES, SamplingConfig
from rl.engine import Engine
from train.objective import language_objective
from train.optimizer import make_optimizer
from train.state import fresh_state
from train.step import make_step

REPEATS = 5
SLOTS, DRAFTS = (1, 8, 64), (1, 2)


def chain(seed: int, rows: int, columns: int, vocab_size: int, noise: float) -> np.ndarray:
    """Draws rows of a chain, [rows, columns] int32; a share `noise` of its tokens is uniform."""
    rng = np.random.default_rng(seed)
    following_V = np.random.default_rng(0).permutation(vocab_size)
    tokens = rng.integers(0, vocab_size, (rows, columns), dtype=np.int32)
    kept = rng.random((rows, columns)) >= noise
    for t in range(1, columns):
        tokens[:, t] = np.where(kept[:, t], following_V[tokens[:, t - 1]], tokens[:, t])
    return tokens


def trained(config: Config, mesh: Mesh, steps: int, noise: float) -> dict:
    """Returns the variables of a model that has learnt the chain; run it under the mesh."""
    model, train = config.model, config.train
    optimizer = make_optimizer(train, boxed_shapes(model)["params"])
    B, T = config.data.batch_size, config.data.seq_len
    state = fresh_state(model, optimizer, mesh, jax.random.key(0))
    step_fn = jax.jit(
        make_step(model, train, language_objective(model, train), optimizer),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )
    ones_BT = jnp.ones((B, T))
    batch = {
        "positions": jnp.broadcast_to(jnp.arange(T), (B, T)),
        "segments": ones_BT.astype(jnp.int32),
        "weights": ones_BT,
    }
    for step in range(steps):
        tokens_BT = chain(step + 1, B, T, model.vocab_size, noise)
        state, _ = step_fn(state, batch | {"tokens": tokens_BT})
    return state.variables


def run(steps: int, noise: float) -> None:
    """Trains, takes both by turns, and prints the ratios."""
    config = tiny_dsv3_config(
        "model.num_nextn_predict_layers=2",
        "train.learning_rate=2e-3",
        f"train.steps={steps}",
        "train.warmup_steps=10",
    )
    model, mesh = config.model, make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        variables = trained(config, mesh, steps, noise)

    def engine(sampling: SamplingConfig, rows: int) -> Engine:
        made = Engine(model, mesh, sampling, rows=rows)
        made.load(variables)
        return made

    def seconds(engine: Engine, sampling: SamplingConfig, seed: int) -> float:
        prompts = random_prompts(seed, max(engine.rows, 8), model, sampling)
        began = time.perf_counter()
        for _ in engine.run(prompts):
            pass
        return time.perf_counter() - began

    plain = config.sampling
    for rows in SLOTS:
        without = engine(plain, rows)
        for drafts, acceptance in ((d, a) for d in DRAFTS for a in DRAFT_ACCEPTANCES):
            sampling = dataclasses.replace(plain, drafts=drafts, draft_acceptance=acceptance)
            drafting, ratios = engine(sampling, rows), []
            for repeat in range(-1, REPEATS):
                times = [seconds(own, plain, repeat + 1) for own in (without, drafting)]
                if repeat >= 0:
                    ratios.append(times[0] / times[1])
            counts = drafting.counts
            figures = {
                "slots": rows,
                "drafts": drafts,
                "acceptance": acceptance,
                "ratio": round(statistics.median(ratios), 3),
                "ratio_least": round(min(ratios), 3),
                "ratio_most": round(max(ratios), 3),
                "accepted": round(counts.accepted / counts.drafted, 3),
                "tokens_per_pass": round(counts.sampled / counts.passes, 3),
            }
            print(json.dumps({"bench": "speculate"} | figures | machine()), flush=True)


if __name__ == "__main__":
    command(
        run,
        config="none",
        workdir=False,
        flags={
            "steps": Flag(150, "train steps on the chain"),
            "noise": Flag(0.05, "share of the chain's tokens that are uniform"),
        },
    )
