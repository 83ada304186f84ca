"""Builds the programs that a plan compiles: the train step and the sampler of a config.

Their arguments have shapes and shardings, and nothing is allocated.
"""

import dataclasses
import functools
import importlib.util
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from data.config import DataConfig, TokenizerConfig
from errors import UserError
from model.adapters import COLLECTION
from model.config import ModelConfig
from model.decode_weights import decode_weights
from model.sharding import batch_sharding, batch_shards, mesh_axes
from plan.flops import rollout_formula, train_formula
from rl.advance import advance
from rl.algorithms.spec import get_algorithm
from rl.config import ReinforceConfig, SamplingConfig
from rl.slots import IDS, Rules, Sampled, empty_slots, place, read_prompts
from train.base import abstract_run_state
from train.config import TrainConfig
from train.lora import learnt_shapes, lora_of
from train.objective import language_objective, trained_mtp
from train.optimizer import make_optimizer
from train.preference_objective import preference_objective
from train.preferences import Preference
from train.state import StateOverBase, TrainState
from train.step import StepOverBase, abstract_batch, jit_step, make_step


class Program(NamedTuple):
    """Something to compile. Bytes are those of one device."""

    jitted: jax.stages.Wrapped
    arguments: tuple  # jax.ShapeDtypeStruct, sharded
    argument_bytes: dict[str, int]  # of the arguments, by kind
    waiting_bytes: dict[str, int]  # of what else the run keeps on the device meanwhile
    trip_count: int  # of its `while` loop
    formula_flops: float  # that the mathematics needs


def with_planned_vocab_size(model: ModelConfig, tokenizer: TokenizerConfig) -> ModelConfig:
    """Fills in the vocabulary's size, if the model leaves it to the tokenizer.

    A run takes it from its tokenizer, a plan from that tokenizer's config.

    Raises:
      UserError: neither the model's config nor the tokenizer's says the size.
    """
    if model.vocab_size:
        return model
    if tokenizer.kind != "bpe":
        raise UserError(
            "model.vocab_size = 0 takes the tokenizer's, and a plan makes no tokenizer; "
            "give --config.model.vocab_size=N"
        )
    return dataclasses.replace(model, vocab_size=tokenizer.vocab_size)


def absent_devices(model: ModelConfig) -> AbstractContextManager:
    """Returns a context in which programs for devices that this process lacks can be traced.

    tokamax refuses to trace them unless it is told.
    """
    if model.expert_matmul != "tokamax" or importlib.util.find_spec("tokamax") is None:
        return nullcontext()
    import tokamax

    return tokamax.config.cross_compile(True)


def train_program(
    model: ModelConfig,
    train: TrainConfig,
    data: DataConfig,
    mesh: Mesh,
    preference: Preference | None = None,
) -> Program:
    """Builds the train step of launch/pretrain.py, or of launch/finetune.py.

    Args:
      preference: the loss over pairs; None predicts the next token. A reference that it compares
        with scores each batch before its step, in a program of its own.

    Raises:
      UserError: the rows of a microbatch do not divide over the mesh.
    """
    rows = train.microbatch_rows(data.batch_size, "data.batch_size")
    _require_divisible("data.batch_size / train.microbatches", rows, mesh)
    if preference:
        train = dataclasses.replace(train, mtp_weight=0.0)  # as train/loop.py has it
        objective = preference_objective(model, train, preference)
    else:
        objective = language_objective(model, train)
    state, optimizer = _learning(model, train, mesh)
    step = jit_step(make_step(model, train, objective, optimizer), state, mesh)
    batch = abstract_batch(data.batch_size, data.seq_len, mesh, objective.reads)
    with_trained_mtp = dataclasses.replace(
        model, num_nextn_predict_layers=trained_mtp(model, train)
    )
    jitted, arguments = step, (state, batch)
    if isinstance(step, StepOverBase) and isinstance(state, StateOverBase):
        jitted, arguments = step.program, (state.learnt, state.base, batch)
    argument_bytes = _state_bytes(state) | {"batch": _bytes_per_device(batch)}
    compares = preference is not None and preference.needs_reference
    return Program(
        jitted=cast(jax.stages.Wrapped, jitted),
        arguments=arguments,
        argument_bytes=argument_bytes,
        waiting_bytes=_reference_bytes(argument_bytes) if compares and not train.lora else {},
        trip_count=1,
        formula_flops=train_formula(with_trained_mtp, train.stage, data.batch_size, data.seq_len),
    )


def rollout_program(
    model: ModelConfig,
    train: TrainConfig,
    sampling: SamplingConfig,
    reinforce: ReinforceConfig,
    mesh: Mesh,
) -> Program:
    """Builds the sampler of launch/reinforce.py; the trainer's state waits on the device meanwhile.

    It has the engine's programs one after the other: it reads prompts for all slots and samples
    until each is full.

    Raises:
      UserError: the prompts of a step do not divide over the mesh.
    """
    group, devices = reinforce.group_size, batch_shards(mesh)
    prompts = min(reinforce.prompts_per_step, max(sampling.slots // group, 1) * devices)
    _require_divisible("reinforce.prompts_per_step", reinforce.prompts_per_step, mesh)
    state, _ = _learning(model, train, mesh)
    tokens, lengths, keys = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for shape, dtype in (
            ((prompts, sampling.max_prompt_tokens), jnp.int32),
            ((prompts,), jnp.int32),
            ((prompts * group, 2), jnp.uint32),
        )
    )
    argument_bytes = _state_bytes(state)
    waiting_bytes = {"moments (waiting)": argument_bytes.pop("moments")}
    algorithm = get_algorithm(
        reinforce.algorithm, max_completion=sampling.most_sampled, kl_weight=reinforce.kl_weight
    )
    if "reference" in algorithm.needs and not train.lora:
        waiting_bytes |= _reference_bytes(argument_bytes)
    argument_bytes["batch"] = _bytes_per_device((tokens, lengths, keys))
    return Program(
        jitted=jax.jit(functools.partial(_full_slots, model, sampling, devices)),
        arguments=(_variables(state), tokens, lengths, keys),
        argument_bytes=argument_bytes,
        waiting_bytes=waiting_bytes,
        trip_count=sampling.max_new_tokens,
        formula_flops=rollout_formula(model, sampling, prompts, group),
    )


def _learning(
    model: ModelConfig, train: TrainConfig, mesh: Mesh
) -> tuple[TrainState, optax.GradientTransformation]:
    """Returns the abstract state of a run, with the base where it learns by adapters."""
    lora = lora_of(model, train)
    optimizer = make_optimizer(train, learnt_shapes(model, lora)["params"])
    return abstract_run_state(model, lora, optimizer, mesh), optimizer


def _reference_bytes(argument_bytes: dict[str, int]) -> dict[str, int]:
    """Returns the bytes of a reference, another model; with adapters it is the base itself."""
    return {"reference policy (waiting)": argument_bytes["parameters"]}


def _variables(state: TrainState) -> dict:
    """Returns the abstract variables of a state; scaled adapters have the shapes of unscaled."""
    if isinstance(state, StateOverBase):
        return state.base | {"router": state.router, COLLECTION: state.params}
    return state.variables


def _full_slots(
    model: ModelConfig,
    sampling: SamplingConfig,
    devices: int,
    variables: dict,
    tokens_PT: Array,
    count_P: Array,
    key_B2: Array,
) -> Sampled:
    """Reads P prompts and samples B / P completions of each, in B slots on all devices together."""
    capacity, rows = sampling.max_prompt_tokens + sampling.max_new_tokens, key_B2.shape[0]
    prompts, each = tokens_PT.shape[0] // devices, rows // tokens_PT.shape[0]
    read = read_prompts(model, sampling, capacity, (), variables, tokens_PT, count_P)
    slots = place(
        empty_slots(model, sampling, rows, capacity),
        *read[:2],
        jnp.tile(jnp.repeat(jnp.arange(prompts), each), devices),
        jnp.tile(jnp.arange(prompts * each), devices),
        Rules(key_B2, jnp.full(rows, sampling.max_new_tokens), *[jnp.full((rows, IDS), -1)] * 2),
    )
    weights = decode_weights(model, variables, rows * (sampling.drafts + 1), sampling.drafts)
    _, sampled = advance(
        model,
        sampling,
        sampling.max_new_tokens,
        (),
        weights,
        slots,
        sampling.max_new_tokens,
        rows + 1,
    )
    return sampled


def _require_divisible(field: str, rows: int, mesh: Mesh) -> None:
    if rows % batch_shards(mesh):
        raise UserError(
            f"{field} = {rows}: does not divide over the {batch_shards(mesh)} devices of mesh axes "
            f"{' x '.join(mesh_axes('batch'))}; change it or the mesh"
        )


def _state_bytes(state: TrainState) -> dict[str, int]:
    base = state.base if isinstance(state, StateOverBase) else ()
    return {
        "parameters": _bytes_per_device((state.params, state.router, base)),
        "moments": _bytes_per_device(state.opt_state),
    }


def _bytes_per_device(tree: Any) -> int:
    """Returns the bytes of one device's shards of a tree of sharded shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
