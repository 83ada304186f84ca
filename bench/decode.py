"""Counts the bytes and cycles of decoding over selected latents on TPU, at DeepSeek-V3.2's widths.

    .venv-compile/bin/python -m bench.decode --topology=v6e:2x2

`make test-compile` makes that environment. The bytes that a token reads are counted, and the
kernels' cycles are those of their static schedules. Nothing is run, so nothing is measured: cycles
are those of code that never waits, and the bytes' time is what the data sheet's bandwidth allows.
One JSON line.
"""

import json
from importlib.metadata import version

from bench.kernels import CLOCK
from bench.schedule import CodeBlock, code_blocks, dump_schedules
from errors import UserError
from experiment.command_line import Flag, command

CONTEXTS = (4_096, 32_768, 131_072)
HEADS = (16, 128)
# V3.2's indexer heads and their width, latent and value channels, and selected keys; then the keys
# of a chunk of the kernel.
I, C, R, V, TOPK, KEYS = 64, 128, 576, 512, 2_048, 256
SCORE_KEYS = 2_048  # of a tile of scores
# Passes over a row's scores: 3 for how many and how large they are, and, of sums of weighted
# rectified normals, 5 to 12 until the threshold is found.
PASSES = 15


def run(topology: str) -> None:
    """Compiles the kernels for a topology and prints the figures of their schedules.

    Raises UserError for a topology whose clock is not in the table.
    """
    kind = topology.partition(":")[0]
    if kind not in CLOCK:
        raise UserError(
            f"--topology={topology}: must be of {', '.join(CLOCK)}, whose clocks are known here"
        )
    with dump_schedules() as directory:  # before JAX is imported
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import Mesh, NamedSharding
        from jax.sharding import PartitionSpec as P

        from kernels.decode_selection import list_selected_tpu
        from kernels.sparse_decode import TILE, decode_tpu
        from plan.topology import CHIPS, topology_devices

        mesh = Mesh(np.array(topology_devices(topology)[:1]), ("one",))
        S, tiles = CONTEXTS[-1], -(-R // TILE)

        def shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P()))

        def schedule(name: str, function, *arguments) -> list[CodeBlock]:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                jax.jit(function).lower(*arguments).compile()
            return code_blocks(directory, name)

        attend = {}
        for heads in HEADS:
            attend[heads] = schedule(
                "sparse_decode",
                lambda q, tiles, index, count: decode_tpu(q, tiles, V, index, count, keys=KEYS),
                shape(2, heads, R),
                shape(2, S, tiles, 2, TILE // 2),
                shape(2, TOPK, dtype=jnp.int32),
                shape(2, dtype=jnp.int32),
            )
        select = schedule(
            "decode_select",
            lambda q, k, w, allowed: list_selected_tpu(q, k, w, allowed, TOPK),
            shape(1, I, C),
            shape(1, S, C),
            shape(1, I, dtype=jnp.float32),
            shape(1, S, dtype=jnp.bool_),
        )
        bandwidth = CHIPS[mesh.devices[0].device_kind].hbm_bandwidth
    about = {"topology": topology, "jax": version("jax"), "libtpu": version("libtpu")}
    found = figures(kind, bandwidth, attend, select)
    print(json.dumps({"bench": "decode", "static": True} | about | found))


def figures(
    kind: str, bandwidth: float, attend: dict[int, list[CodeBlock]], select: list[CodeBlock]
) -> dict:
    """Computes the figures of one row: its cycles on one core, and the bytes it reads.

    Args:
      kind: of chip, a key of CLOCK.
      bandwidth: of a whole device, bytes a second.
      attend: the schedule of attention, by heads.
      select: the schedule of the selection.
    """
    clock, _ = CLOCK[kind]  # a row runs on one core
    heads = [attention_figures(N, blocks, clock) for N, blocks in attend.items()]
    rows = [context_figures(S, select, bandwidth, clock) for S in CONTEXTS]
    return {"topk": TOPK, "attention": heads, "rows": rows}


def attention_figures(heads: int, blocks: list[CodeBlock], clock: float) -> dict:
    """Returns the cycles of attention over TOPK latents, from the kernel's schedule."""
    from kernels.sparse_decode import UNROLLED

    # The copies of the first chunk, alone.
    first = next(block.bundles for block in blocks if block.depth == 2) * KEYS // UNROLLED
    # The code of a chunk with the copies of the next one and without; the schedule has each twice.
    products = sorted((block.bundles for block in blocks if block.mxu > 0), reverse=True)
    chunk, _, last, *_ = products
    cycles = first + (TOPK // KEYS - 1) * chunk + last
    return {
        "heads": heads,
        "cycles_per_key": round(chunk / KEYS, 2),
        "cycles": cycles,
        "first_copies": round(first / cycles, 3),
        "microseconds": round(cycles / clock * 1e6, 2),
    }


def context_figures(S: int, select: list[CodeBlock], bandwidth: float, clock: float) -> dict:
    """Returns the bytes that a token reads with S tokens before it, and the selection's cycles."""
    from kernels.decode_selection import GROUP, LISTED
    from kernels.sparse_decode import TILE

    # In order: a tile of SCORE_KEYS scores; of the list a group of tokens, a part of the list in
    # that group, and the ranks of all.
    scored, group, part_of_list, ranks, *_ = (block.bundles for block in select if block.mxu > 0)
    # A group of tokens in one pass; the code around that loop is left out.
    counted = next(block.bundles for block in select if block.depth == 2 and block.loop)
    groups = -(-S // GROUP)
    cycles = {
        "score": S // SCORE_KEYS * scored,
        "count": PASSES * groups * counted,
        "list": groups * (group + part_of_list) + TOPK // LISTED * part_of_list + ranks,
    }
    needed = S * C * 2 + TOPK * R * 2
    reads = {
        "indexer_keys": S * C * 2,
        "latents": TOPK * -(-R // TILE) * TILE * 2,
        "allowed": S * 4,
        "list": 2 * TOPK * 4,
    }
    total = sum(reads.values())
    return {
        "context": S,
        "bytes": reads,
        "bytes_over_needed": round(total / needed, 3),
        "dense_bytes_over_these": round((S * R * 2) / total, 2),
        "microseconds_of_reading": round(total / bandwidth * 1e6, 2),
        "cycles_of_selection": cycles,
        "microseconds_of_selection": round(sum(cycles.values()) / clock * 1e6, 2),
    }


if __name__ == "__main__":
    flags = {
        "topology": Flag(
            "v6e:2x2", "v5e:2x2, v5p:2x2x1, v6e:2x2 or tpu7x:2x2x1: compile for it, and run nothing"
        )
    }
    command(run, config="none", workdir=False, flags=flags)
