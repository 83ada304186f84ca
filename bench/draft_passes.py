"""Compares one pass that verifies drafts with the passes it stands for, compiled for TPU.

    .venv-compile/bin/python -m bench.draft_passes --topology=v6e:2x4

`make test-compile` makes that environment. It compiles the engine's `advance` for a pass of
DeepSeek-V3.2's shape in the sparse stage, of two and three layers, from which the 61 are
extrapolated; the MTP module counts once. The figures are
bounds: bytes that the compiled program moves, over the data sheet's bandwidth. Nothing is run, so
nothing is measured. One JSON line.
"""

import functools
import json
import sys
from importlib.metadata import version
from typing import Any

from experiment.command_line import Flag, command

DENSE, EXPERTS = 3, 58  # layers of DeepSeek-V3.2


def run(topology: str, rows: int, context: int) -> None:
    """Compiles the passes and prints the least time of each."""
    import jax
    import optax

    from experiment.config_files import ConfigSource
    from experiment.schema import parse
    from model.config import ModelConfig
    from model.decode_weights import decode_weights
    from model.mesh import MESH_AXES
    from model.sharding import batch_sharding, make_mesh, replicated
    from plan.account import Plan, make_plan
    from plan.programs import Program
    from plan.topology import topology_devices
    from rl.advance import advance
    from rl.config import SamplingConfig
    from rl.slots import empty_slots
    from train.state import abstract_state

    devices = topology_devices(topology)
    overrides = [f"mesh.{axis}={len(devices) if axis == 'tensor' else 1}" for axis in MESH_AXES]

    def one_pass(dense: int, experts: int, drafts: int) -> Plan:
        """Accounts for a pass of a model of so many layers, the first of them dense."""
        fields = [
            f"model.num_hidden_layers={dense + experts}",
            f"model.first_k_dense_replace={dense}",
            "model.num_nextn_predict_layers=1",
            "model.dtype=bfloat16",
        ]
        source = (f"--config.{each}" for each in overrides + fields)
        config = parse(ConfigSource("configs/deepseek_v32.py", tuple(source)).read())
        model: ModelConfig = config.model
        sampling = SamplingConfig(
            max_prompt_tokens=context // 2, max_new_tokens=context // 2, drafts=drafts
        )
        mesh = make_mesh(config.mesh, devices)
        with jax.set_mesh(mesh):

            def placed(shapes: Any, shardings: Any) -> Any:
                return jax.tree.map(
                    lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
                    shapes,
                    shardings,
                )

            variables = abstract_state(model, optax.identity(), mesh).variables
            prepare = jax.jit(
                functools.partial(decode_weights, model, rows=rows * (drafts + 1), drafts=drafts)
            )
            shardings = prepare.lower(variables).compile().output_shardings
            weights = placed(jax.eval_shape(prepare, variables), shardings)
            empty = functools.partial(empty_slots, model, sampling, rows, context)
            shapes = jax.eval_shape(empty)
            slots = placed(shapes, jax.tree.map(lambda _: batch_sharding(mesh), shapes))
            program = Program(
                jitted=jax.jit(
                    functools.partial(advance, model, sampling, 1, ()),
                    donate_argnums=1,
                    out_shardings=(batch_sharding(mesh), replicated(mesh)),
                ),
                arguments=(weights, slots, 1, rows + 1),
                argument_bytes={},
                waiting_bytes={},
                trip_count=1,
                formula_flops=0.0,
            )
            return make_plan("pass", program, mesh)

    figures: dict[str, float] = {}
    for drafts in (0, 1):
        found = []
        for layers in ((1, 1), (2, 1), (1, 2)):
            found.append(one_pass(*layers, drafts).seconds)
            print(f"compiled {sum(layers)} layers, {drafts} drafts", file=sys.stderr, flush=True)
        least, more_dense, more_experts = found
        for limit, seconds in least.items():
            dense, experts = (more[limit] - seconds for more in (more_dense, more_experts))
            whole = seconds + (DENSE - 1) * dense + (EXPERTS - 1) * experts
            figures[f"{limit}_ms_{drafts}_drafts"] = round(1e3 * whole, 3)
    about = {"topology": topology, "rows": rows, "context": context, "jax": version("jax")}
    print(json.dumps({"bench": "draft_passes"} | about | figures))


if __name__ == "__main__":
    command(
        run,
        config="none",
        workdir=False,
        flags={
            "topology": Flag("v6e:2x4", "the chips that it is compiled for"),
            "rows": Flag(64, "sequences that are decoded at a time"),
            "context": Flag(32_768, "tokens that each has room for"),
        },
    )
