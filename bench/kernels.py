"""The TPU kernels' tiles by their static schedules, at DeepSeek-V3.2's widths: cycles if nothing stalls, and how much of the matrix units' peak that is.

    .venv-compile/bin/python -m bench.kernels --topology=v6e:2x2          (make test-compile makes that environment)

Nothing is run, so nothing is measured; waits for memory are not in it. One JSON line.
"""

import json
from importlib.metadata import version

from bench.schedule import dumped, stretches
from errors import UserError
from launch.command import Flag, command

CLOCK = {"v5e": 1.5e9, "v6e": 1.75e9}  # of the matrix units: what makes their number and size come to the peak on the data sheet
L, HEADS = 8_192, 16
I, C, H, V = 64, 128, 192, 128  # the indexer's heads and width; the attention's widths


def run(topology: str) -> None:
    kind = topology.partition(":")[0]
    if kind not in CLOCK:
        raise UserError(f"--topology={topology}: must be of {' or '.join(CLOCK)}, whose clocks are known here")
    with dumped() as directory:  # before JAX is imported
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import Mesh, NamedSharding
        from jax.sharding import PartitionSpec as P

        from launch.topology import CHIPS, topology_devices
        from model.kernels import indexer_kl, sparse_attention
        from model.kernels.selection import select_tpu

        mesh = Mesh(np.array(topology_devices(topology)[:1]), ("one",))

        def shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P()))

        def step(q, k, v, iq, w, ik, segments):
            bits, _ = select_tpu(iq, ik, w, segments, segments, jnp.arange(L), 2_048)

            def total(q, k, v, iq, w, ik):
                out, lse = sparse_attention.attend_tpu(q, k, v, bits)
                attention = jax.lax.stop_gradient(indexer_kl.Attention(q, k, lse))
                return jnp.sum(out.astype(jnp.float32)) + indexer_kl.total_kl_tpu(attention, iq, w, ik, bits, bits)[0]

            return jax.grad(total, range(6))(q, k, v, iq, w, ik)

        heads = (shape(1, HEADS, L, width) for width in (H, H, V))
        indexer = shape(1, L, I, C), shape(1, L, I, dtype=jnp.float32), shape(1, L, C)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            jax.jit(step).lower(*heads, *indexer, shape(1, L, dtype=jnp.int32)).compile()
        peak = CHIPS[mesh.devices[0].device_kind].flops / CLOCK[kind]  # a cycle
        attend, loss = sparse_attention.Tiles(), indexer_kl.Tiles()
        pairs, loss_pairs = attend.queries * attend.keys * attend.heads, loss.queries * loss.keys
        flops = {  # of a tile: what the mathematics needs, two a product
            "select": 2 * 128 * 512 * I * C,
            "sparse_attention": 2 * pairs * (H + V),
            "sparse_attention_dq": 2 * pairs * (2 * H + V),
            "sparse_attention_dkv": 2 * pairs * (2 * H + 2 * V),
            "indexer_normaliser": 2 * loss_pairs * I * C,
            "indexer_kl": 2 * loss_pairs * (HEADS * H + 3 * I * C),
        }
        rows = []
        for name, needed in flops.items():
            tile = max(stretches(directory, name), key=lambda stretch: stretch.bundles)
            share = needed / tile.bundles / peak
            rows.append({"kernel": name, "tile_gflop": round(needed / 1e9, 2), "cycles": tile.bundles, "of_peak": round(share, 3), "spills": tile.spills})
    print(json.dumps({"bench": "kernels", "static": True, "topology": topology, "jax": version("jax"), "libtpu": version("libtpu"), "rows": rows}))


if __name__ == "__main__":
    command(run, config="none", workdir=False, flags={"topology": Flag("v6e:2x2", "v5e:2x2 or v6e:2x2")})
