"""Measures sparse training against dense: whole steps of tiny-dsv3 with an indexer, by turns.

    python -m bench.sparse_train --length=1024

The indexer has 4 heads and selects 64 keys. Prints one JSON line: the least seconds of a step, in
stage "dense" and in stage "sparse" by either form of attention, and their ratios to dense.
"""

import json
import time

import jax

from bench.train import train_action
from bench.workload import machine, tiny_dsv3_config
from errors import UserError
from experiment.command_line import command
from experiment.flags import Flag
from model.sharding import make_mesh

TOKENS, TOPK = 2_048, 64  # of a step where rows are short enough; keys that are selected
FORMS = {
    "dense": ("dense", "chunks"),
    "masked": ("sparse", "chunks"),
    "gathered": ("sparse", "gathered"),
}


def run(length: int, rounds: int) -> None:
    """Measures each form `rounds` times, by turns.

    Raises UserError for a length of which the selected keys are all.
    """
    if length <= TOPK:
        raise UserError(f"--length={length}: must be more than the {TOPK} keys that are selected")
    rows, least = max(1, TOKENS // length), dict.fromkeys(FORMS, float("inf"))
    configs = {
        name: tiny_dsv3_config(
            f"data.seq_len={length}",
            f"data.batch_size={rows}",
            "model.indexer.n_heads=4",
            f"model.indexer.topk={TOPK}",
            f"train.stage={stage}",
            f"model.attention_form={form}",
        )
        for name, (stage, form) in FORMS.items()
    }
    with jax.set_mesh(make_mesh(configs["dense"].mesh)):
        actions = {name: train_action(config) for name, config in configs.items()}
        for turn in range(-1, rounds):
            for name, action in actions.items():
                began = time.perf_counter()
                jax.block_until_ready(action(turn))
                if turn >= 0:  # the first turn compiles
                    least[name] = min(least[name], time.perf_counter() - began)
    result = {"bench": "sparse_train", "rows": rows, "length": length, "topk": TOPK}
    result |= {f"{name}_seconds": round(least[name], 4) for name in FORMS}
    result |= {
        f"{name}_ratio": round(least[name] / least["dense"], 3) for name in ("masked", "gathered")
    }
    about = machine()
    print(json.dumps(result | about))


if __name__ == "__main__":
    flags = {"length": Flag(1_024, "tokens of a row"), "rounds": Flag(5, "steps of each form")}
    command(run, config="none", workdir=False, flags=flags)
