"""Measures how far the trainer's log-probs of sampled tokens are from the sampler's, same weights.

    python -m bench.drift
    python -m bench.drift --shapes=dsa --drafts=0 --mesh=data=2,fsdp=2,expert=2

Small models of each shape sample with the engine, and the trainer scores the same tokens with the
same weights: all that differs is the programs. Where there are experts or an indexer, the trainer
may do again what the sampler's layers chose: `replay` says what, of "routes", "selected" or "both".
Prints one JSON line a case: `max` and `mean` of |difference of log-probs| in nats over the sampled
tokens; `half_ulp_max` and `half_ulp_mean`, by how much the trainer's own log-probs move when each
weight moves by half a unit in its last place, up or down by lot, which no program of these weights
can be expected to beat; `jaccard` of the sampler's choices and those that the trainer would make
itself (rl/agreement.py); and `nats`, the mean of -log-prob.

Weights are random, of standard deviation 1 / sqrt(hidden_size), so that a matmul keeps the size of
what it gets: at a new model's 0.02 a tiny model's distribution is uniform, and nothing that differs
within is seen in its log-probs.
"""

import dataclasses
import functools
import itertools
import json
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from bench.workload import machine, random_prompts
from errors import UserError
from experiment.command_line import command
from experiment.flags import Flag
from experiment.processes import pretend_devices
from model.config import ModelConfig
from model.layer_configs import DeltaConfig, GQAConfig, IndexerConfig, MLAConfig, MoEConfig
from model.mesh import MESH_AXES, MeshConfig
from model.record import CHOICES
from model.sharding import batch_sharding, make_mesh, replicated
from rl.agreement import choices_alike
from rl.config import SamplingConfig
from rl.engine import Engine
from rl.trajectory import batch_of
from train.scoring import logprobs_at_tokens
from train.state import fresh_state

ROWS, PROMPT, NEW = 16, 64, 64
PLAIN = ModelConfig(
    vocab_size=256,
    hidden_size=128,
    num_hidden_layers=4,
    first_k_dense_replace=4,
    intermediate_size=256,
    num_nextn_predict_layers=0,
    initializer_range=128**-0.5,
    mla=MLAConfig(
        num_attention_heads=4,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    ),
    gqa=GQAConfig(num_attention_heads=4, head_dim=32, rotary_dim=16),
    delta=DeltaConfig(
        num_key_heads=2, num_value_heads=4, key_head_dim=16, value_head_dim=16, chunk_size=16
    ),
    indexer=IndexerConfig(n_heads=0, head_dim=16, rope_head_dim=8, topk=16),
    moe=MoEConfig(num_experts=16, num_experts_per_tok=2, intermediate_size=64),
)
SHAPES = {
    "dense": dataclasses.replace(PLAIN, layer_types=("gqa",)),
    "moe": dataclasses.replace(PLAIN, layer_types=("gqa",), first_k_dense_replace=1),
    "mla": PLAIN,
    "dsa": dataclasses.replace(
        PLAIN, first_k_dense_replace=1, indexer=dataclasses.replace(PLAIN.indexer, n_heads=4)
    ),
    "qwen3_next": dataclasses.replace(
        PLAIN,
        layer_types=("delta", "delta", "delta", "gqa"),
        first_k_dense_replace=0,
        norm="zero_centred",
        moe=dataclasses.replace(
            PLAIN.moe, scoring_func="softmax", router_bias=False, shared_expert_gate=True
        ),
    ),
}
DTYPES = ("float32", "bfloat16")
REPLAYS = {"none": (), "routes": ("routes",), "selected": ("selected",), "both": CHOICES}


class Case(NamedTuple):
    """What is sampled, and how.

    Attributes:
      shape: a name of SHAPES.
      dtype: of the computation.
      sampling: settings of the sampler beside the lengths. Where it drafts, the model has as many
        MTP modules.
    """

    shape: str
    dtype: str
    sampling: SamplingConfig = SamplingConfig()

    @property
    def model(self) -> ModelConfig:
        """The model."""
        modules = self.sampling.drafts
        shape = SHAPES[self.shape]
        return dataclasses.replace(shape, dtype=self.dtype, num_nextn_predict_layers=modules)

    @property
    def stage(self) -> str:
        """How attention runs."""
        return "sparse" if self.model.indexer.n_heads else "dense"


def drift(case: Case, mesh: Mesh) -> list[dict]:
    """Samples, scores under each replay that the model has choices for, and returns the lines."""
    model = case.model
    sampling = dataclasses.replace(
        case.sampling, max_prompt_tokens=PROMPT, max_new_tokens=NEW, attention=case.stage
    )
    engine = Engine(model, mesh, sampling, rows=ROWS, record=CHOICES)
    with jax.set_mesh(mesh):
        variables = fresh_state(model, optax.identity(), mesh, jax.random.key(0)).variables
    with engine.loaded(variables):
        found = engine.run(random_prompts(0, ROWS, model, sampling))
        trajectories = sorted(found, key=lambda each: each.group)
    batch = batch_of(trajectories, engine.capacity, 0)
    sampler_BT, mask_BT = batch["sampler_logprobs"], batch["mask"]
    score = functools.partial(logprobs_at_tokens, model, case.stage, sampling.temperature)
    alike = functools.partial(choices_alike, model, case.stage)
    lines = []
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, batch_sharding(mesh))
        moved = half_an_ulp_off(variables, case.dtype)
        whole = replicated(mesh)
        compared = jax.jit(alike, out_shardings=whole)(variables, batch)
        jaccard = {
            name: round(float(jnp.sum(mean.total) / jnp.sum(mean.weight)), 5)
            for name, mean in compared.items()
        }
        for replay, names in REPLAYS.items():
            if not batch.keys() >= set(names):
                continue
            given = {name: x for name, x in batch.items() if name not in CHOICES or name in names}
            scored = jax.jit(score, out_shardings=whole)
            scored_BT, moved_BT = (np.asarray(scored(each, given)) for each in (variables, moved))
            figures = {}
            for name, other_BT in (("", sampler_BT), ("half_ulp_", moved_BT)):
                gaps = np.abs(scored_BT - other_BT)[mask_BT]
                figures |= {f"{name}max": float(gaps.max()), f"{name}mean": float(gaps.mean())}
            about = {"shape": case.shape, "dtype": case.dtype, "replay": replay}
            about |= {"drafts": sampling.drafts, "mesh": mesh_name(mesh)}
            nats = {"nats": round(float(-sampler_BT[mask_BT].mean()), 3)}
            nats |= {"tokens": int(mask_BT.sum())}
            lines.append(about | figures | {"jaccard": jaccard} | nats)
    return lines


def half_an_ulp_off(variables: dict, dtype: str) -> dict:
    """Returns the variables, each moved by half a unit in the last place of `dtype`."""
    half, rng = float(jnp.finfo(dtype).eps) / 2, np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x * (1 + half * rng.choice([-1, 1], x.shape).astype(np.float32)), variables
    )


def mesh_name(mesh: Mesh) -> str:
    """Returns the axes of a mesh that have more than one device, or "one"."""
    sizes = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    return ",".join(sizes) or "one"


def mesh_config(text: str) -> MeshConfig:
    """Reads "data=2,expert=4"; axes that are not named have one device.

    Raises UserError for anything else.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.isdecimal():
            axes = ", ".join(MESH_AXES)
            raise UserError(f'--mesh={text}: must be like "data=2,expert=4", of the axes {axes}')
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def run(shapes: str, dtypes: str, drafts: str, mesh: str) -> None:
    """Prints the line of each case."""
    config = mesh_config(mesh)
    devices = math.prod(getattr(config, axis) for axis in MESH_AXES)
    pretend_devices(devices if devices > 1 else 0)
    made = make_mesh(config, jax.devices()[:devices])
    for flag, text, known in (("shapes", shapes, SHAPES), ("dtypes", dtypes, DTYPES)):
        if not set(text.split(",")) <= set(known):
            raise UserError(f"--{flag}={text}: must be some of {', '.join(known)}")
    if not all(each.isdecimal() for each in drafts.split(",")):
        raise UserError(f"--drafts={drafts}: must be numbers of drafts, such as 0,1")
    several = itertools.product(shapes.split(","), dtypes.split(","), drafts.split(","))
    for shape, dtype, each in several:
        for line in drift(Case(shape, dtype, SamplingConfig(drafts=int(each))), made):
            print(json.dumps({"bench": "drift"} | line | machine()), flush=True)


if __name__ == "__main__":
    command(
        run,
        config="none",
        workdir=False,
        flags={
            "shapes": Flag(",".join(SHAPES), "some of these"),
            "dtypes": Flag(",".join(DTYPES), "some of these"),
            "drafts": Flag("0,1", "tokens that MTP modules draft; 0 samples without"),
            "mesh": Flag("", 'devices to pretend, such as "data=2,expert=4"; "" for one'),
        },
    )
