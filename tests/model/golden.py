"""The recorded checkpoints of tests/golden, and what this codebase computes from them.

Each is loaded, and its forward pass compiled, once in a process.

Tolerances of the tests that use them: logits have a standard deviation of about 3, and float32 sums
in another order differ by 1e-4 at most. Choices are identical: the checkpoints were made with
margins above that noise.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from checkpoints.hf.checkpoint import HFCheckpoint
from checkpoints.hf.load import load_checkpoint
from configs import base
from experiment.model_source import with_hf_fields
from experiment.schema import parse
from model.config import ModelConfig
from model.heads import logits_of
from model.record import Record, recorded_forward
from model.transformer import boxed_shapes

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
WITH_INDEXER = [case for case in CASES if "indexer" in np.load(GOLDEN / case / "golden.npz")]
WITH_MTP = [case for case in CASES if "mtp_logits" in np.load(GOLDEN / case / "golden.npz")]


@functools.cache
def golden(case: str) -> dict[str, np.ndarray]:
    """The recorded values."""
    return dict(np.load(GOLDEN / case / "golden.npz"))


@functools.cache
def model(case: str) -> ModelConfig:
    """The checkpoint's model, in float32."""
    return dataclasses.replace(
        parse(with_hf_fields(base.get_config(), GOLDEN / case)).model, dtype="float32"
    )


@functools.cache
def checkpoint(case: str) -> HFCheckpoint:
    """The checkpoint's files."""
    return HFCheckpoint(GOLDEN / case, model(case))


def abstract(case: str, place: Callable) -> dict:
    """Shapes and shardings of the variables; `place` makes a tree of shardings of their shapes."""
    shapes = jax.tree.map(
        lambda boxed: boxed.value,
        boxed_shapes(model(case)),
        is_leaf=lambda leaf: hasattr(leaf, "names"),
    )
    return jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape.shape, jnp.float32, sharding=where),
        shapes,
        place(shapes),
    )


def load_on_one_device(case: str) -> dict:
    """Reads the variables from the files."""
    one = SingleDeviceSharding(jax.devices()[0])
    return load_checkpoint(
        checkpoint(case), abstract(case, lambda shapes: jax.tree.map(lambda _: one, shapes))
    )


@functools.cache
def variables(case: str) -> dict:
    """The variables, on one device."""
    return load_on_one_device(case)


def stage(case: str) -> str:
    """The stage that the checkpoint's attention is of."""
    return "sparse" if model(case).indexer.n_heads else "dense"


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(config: ModelConfig, stage: str, variables: dict, tokens_BT, segments_BT):
    """Logits of the next token, logits of each MTP depth, and the record."""
    positions_BT = jnp.maximum(jnp.cumsum(segments_BT > 0, axis=-1) - 1, 0)
    output, record = recorded_forward(
        config, variables, tokens_BT, positions_BT, segments_BT, stage
    )
    head = functools.partial(logits_of, config, variables["params"])
    return head(output.hidden_BTD), tuple(map(head, output.mtp_hidden)), record


SHORT = 11  # tokens of a row that the recorded padded_logits are of


@functools.cache
def found(case: str) -> tuple[jax.Array, tuple[jax.Array, ...], Record]:
    """`forward` of everything that was recorded, in one batch, so that it is compiled once.

    Two rows are the recorded prompts and, behind them, the answers that were decoded greedily: by
    causality what they give for the prompts is what the prompts alone do. Three are the first SHORT
    tokens of a prompt: padded on the left, padded on the right, and with further tokens behind.
    """
    prompts_BT, answers_BT = golden(case)["input_ids"], golden(case)["greedy"]
    whole_BT = np.concatenate([prompts_BT, answers_BT[:, :-1]], axis=1)
    width = whole_BT.shape[1]
    tokens_BT, segments_BT = np.zeros((2, 5, width), np.int32)
    tokens_BT[:2], segments_BT[:2] = whole_BT, 1
    for row, slots in ((2, slice(width - SHORT, width)), (3, slice(SHORT)), (4, slice(20))):
        length = slots.stop - (slots.start or 0)
        tokens_BT[row, slots], segments_BT[row, slots] = prompts_BT[0, :length], 1
    return forward(
        model(case), stage(case), variables(case), jnp.asarray(tokens_BT), jnp.asarray(segments_BT)
    )


def of_prompts(case: str, x_BT):
    """What `found` has of the recorded prompts: arrays [rows, T, ...]."""
    return x_BT[:2, : golden(case)["input_ids"].shape[1]]
