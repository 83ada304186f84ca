"""Decoding over selected latents on TPU, at DeepSeek-V3.2's widths: the bytes a token reads,
counted, and the kernels' cycles by their static schedules.

    .venv-compile/bin/python -m bench.decode --topology=v6e:2x2          (make test-compile makes
    that environment)

Nothing is run, so nothing is measured: cycles are those of code that never waits, and the bytes'
time is what the data sheet's bandwidth allows. One JSON line.
"""

import json
from importlib.metadata import version

from bench.kernels import CLOCK
from bench.schedule import Stretch, dumped, stretches
from errors import UserError
from experiment.command_line import Flag, command

CONTEXTS = (4_096, 32_768, 131_072)
HEADS = (16, 128)
I, C, R, V, TOPK, KEYS = 64, 128, 576, 512, 2_048, 256
# over a row's scores: 3 for how many and how large they are, and, of sums of weighted rectified
# normals, 5 to 12 until the threshold is found
PASSES = 15


def run(topology: str) -> None:
    kind = topology.partition(":")[0]
    if kind not in CLOCK:
        raise UserError(
            f"--topology={topology}: must be of {', '.join(CLOCK)}, whose clocks are known here"
        )
    with dumped() as directory:  # before JAX is imported
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import Mesh, NamedSharding
        from jax.sharding import PartitionSpec as P

        from kernels.decode_selection import select_tpu
        from kernels.sparse_decode import TILE, decode_tpu
        from plan.topology import CHIPS, topology_devices

        mesh = Mesh(np.array(topology_devices(topology)[:1]), ("one",))
        S, tiles = CONTEXTS[-1], -(-R // TILE)

        def shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P()))

        def schedule(name: str, function, *arguments) -> list[Stretch]:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                jax.jit(function).lower(*arguments).compile()
            return stretches(directory, name)

        attend = {}
        for heads in HEADS:
            arguments = (
                shape(2, heads, R),
                shape(2, S, tiles, 2, TILE // 2),
                shape(2, TOPK, dtype=jnp.int32),
                shape(2, dtype=jnp.int32),
            )
            attend[heads] = schedule(
                "sparse_decode",
                lambda *x: decode_tpu(x[0], x[1], V, x[2], x[3], keys=KEYS),
                *arguments,
            )
        select = schedule(
            "decode_select",
            lambda *x: select_tpu(*x, TOPK),
            shape(1, I, C),
            shape(1, S, C),
            shape(1, I, dtype=jnp.float32),
            shape(1, S, dtype=jnp.bool_),
        )
    bandwidth = CHIPS[mesh.devices[0].device_kind].hbm_bandwidth
    about = {"topology": topology, "jax": version("jax"), "libtpu": version("libtpu")}
    print(
        json.dumps(
            {"bench": "decode", "static": True} | about | figures(kind, bandwidth, attend, select)
        )
    )


def figures(
    kind: str, bandwidth: float, attend: dict[int, list[Stretch]], select: list[Stretch]
) -> dict:
    """Of a row: a core's cycles by the kernels' schedules (`attend`: by heads), and the bytes it
    reads, with a device's whole bandwidth.
    """
    from kernels.decode_selection import GROUP, LISTED
    from kernels.sparse_decode import TILE, UNROLLED

    clock, _ = CLOCK[kind]  # a row is one core's
    tiles = -(-R // TILE)
    heads = []
    for N, code in attend.items():
        first = (
            next(part.bundles for part in code if part.depth == 2) * KEYS // UNROLLED
        )  # the copies of the first chunk, alone
        chunk, _, last, *_ = sorted(
            (part.bundles for part in code if part.mxu > 0), reverse=True
        )  # among the copies of the next, and without; each twice
        cycles = first + (TOPK // KEYS - 1) * chunk + last
        shares = {
            "cycles_per_key": round(chunk / KEYS, 2),
            "cycles": cycles,
            "first_copies": round(first / cycles, 3),
        }
        heads.append({"heads": N} | shares | {"microseconds": round(cycles / clock * 1e6, 2)})

    scored = next(
        part.bundles for part in select if part.mxu > 0
    )  # the first with products: a tile of 2,048 keys
    listed = [part.bundles for part in select if part.mxu > 0][
        1:
    ]  # of a group of tokens; of a piece of the list in it; all pieces' ranks
    counted = next(
        part.bundles for part in select if part.depth == 2 and part.loop
    )  # a group of tokens in one pass; what stands around that loop is left out
    rows = []
    for S in CONTEXTS:
        groups = -(-S // GROUP)
        cycles = {
            "score": S // 2_048 * scored,
            "count": PASSES * groups * counted,
            "list": groups * (listed[0] + listed[1]) + TOPK // LISTED * listed[1] + listed[2],
        }
        needed = S * C * 2 + TOPK * R * 2
        reads = {
            "indexer_keys": S * C * 2,
            "latents": TOPK * tiles * TILE * 2,
            "allowed": S * 4,
            "list": 2 * TOPK * 4,
        }
        rows.append(
            {
                "context": S,
                "bytes": reads,
                "bytes_over_needed": round(sum(reads.values()) / needed, 3),
                "dense_bytes_over_these": round((S * R * 2) / sum(reads.values()), 2),
                "microseconds_of_reading": round(sum(reads.values()) / bandwidth * 1e6, 2),
                "cycles_of_selection": cycles,
                "microseconds_of_selection": round(sum(cycles.values()) / clock * 1e6, 2),
            }
        )
    return {"topk": TOPK, "attention": heads, "rows": rows}


if __name__ == "__main__":
    flags = {
        "topology": Flag(
            "v6e:2x2", "v5e:2x2, v5p:2x2x1, v6e:2x2 or tpu7x:2x2x1: compile for it, and run nothing"
        )
    }
    command(run, config="none", workdir=False, flags=flags)
