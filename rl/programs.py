"""The engine's programs, compiled for a mesh: each has one shape for all lengths there may be."""

import functools

import jax
from jax.sharding import Mesh

from errors import UserError
from kernels.device import compiler_options
from model.config import ModelConfig
from model.decode_weights import decode_weights
from model.record import CHOICES
from model.sharding import batch_sharding, replicated
from rl.advance import advance
from rl.config import SamplingConfig
from rl.slots import empty_slots, extend, halt, place, read_prompts

MOST_STEPS = 32  # tokens that `advance` samples at a time, at most


class Programs:
    """What the engine runs on the devices, see rl/slots.py and rl/advance.py.

    Args:
      rows: the number of slots.
      capacity: tokens that a slot holds.
      record: which of `rl.records.RECORDS` are returned.

    Attributes:
      prepare: variables -> the weights that decoding takes.
      empty, read, place, extend, halt, advance: the functions of those modules, without their first
        arguments.

    Raises UserError where more drafts are asked for than the model has MTP modules.
    """

    def __init__(
        self,
        model: ModelConfig,
        mesh: Mesh,
        sampling: SamplingConfig,
        rows: int,
        capacity: int,
        record: frozenset[str],
    ):
        drafts, modules = sampling.drafts, model.num_nextn_predict_layers
        if drafts > modules:
            raise UserError(
                f"sampling.drafts = {drafts}: the model has {modules} MTP modules, each of which "
                "drafts one token; lower it to at most that"
            )
        # What only moves arrays need not be optimised well; decoding does: it takes 5 to 7 %
        # longer with the options that spare a CPU's compiler work.
        quick, W = compiler_options(mesh), drafts + 1
        # Every program gives its slots back in one and the same sharding: another would be another
        # program to compile.
        by_row = functools.partial(jax.jit, out_shardings=batch_sharding(mesh))
        with_record = functools.partial(
            jax.jit,
            donate_argnums=1,
            out_shardings=(batch_sharding(mesh), replicated(mesh)),
        )
        prepare = functools.partial(decode_weights, model, rows=rows * W, drafts=drafts)
        self.prepare = jax.jit(prepare, compiler_options=quick)
        empty = functools.partial(empty_slots, model, sampling, rows, capacity)
        self.empty = by_row(empty, compiler_options=quick)
        choices = record & frozenset(CHOICES)
        self.read = by_row(functools.partial(read_prompts, model, sampling, capacity, choices))
        self.place = by_row(functools.partial(place), donate_argnums=0, compiler_options=quick)
        self.extend = with_record(functools.partial(extend, model, sampling, choices))
        self.halt = by_row(functools.partial(halt), donate_argnums=0, compiler_options=quick)
        most_passes = -(-MOST_STEPS // W)
        self.advance = with_record(functools.partial(advance, model, sampling, most_passes, record))
