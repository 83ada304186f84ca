"""The optimizers and their schedule, by optax; what is trained, and what decays."""

import re

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from errors import UserError
from train.config import TrainConfig

# Parameters that no matrix multiplies.
PER_CHANNEL = (
    "scale",
    "bias",
    "taps",
    "query_taps",
    "key_taps",
    "value_taps",
    "decay_rate",
    "decay_bias",
)
MUON_MOMENTUM = 0.95
# Five times the same coefficients (optax's own): given a row a step, optax scans over the steps;
# given one row it unrolls them for every matrix, and the quickstart's step takes a sixth longer to
# compile.
NEWTON_SCHULZ = ((3.4445, -4.775, 2.0315),) * 5
# root mean square of an update at learning rate 1: about that of AdamW's (arXiv 2502.16982, section
# 2.2), so one rate serves both
MUON_RMS = 0.2


def schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, constant, cosine, constant: the shape of DeepSeek-V3's (arXiv 2412.19437,
    section 4.2).
    """
    peak = config.learning_rate
    cosine_steps = config.cosine_steps
    if cosine_steps == -1:
        cosine_steps = max(config.steps - config.warmup_steps - config.constant_steps, 0)
    pieces = [
        (optax.linear_schedule(0.0, peak, config.warmup_steps), config.warmup_steps),
        (optax.constant_schedule(peak), config.constant_steps),
        (
            optax.cosine_decay_schedule(peak, max(cosine_steps, 1), alpha=config.final_ratio),
            cosine_steps,
        ),
    ]
    end = config.final_ratio * peak if cosine_steps else peak
    pieces = [(piece, steps) for piece, steps in pieces if steps] + [
        (optax.constant_schedule(end), None)
    ]
    boundaries, at = [], 0
    for _, steps in pieces[:-1]:
        at += steps
        boundaries.append(at)
    # A step that starts at 0 would be wasted at learning rate 0: the schedule is read one step on.
    joined = optax.join_schedules([piece for piece, _ in pieces], boundaries)
    return lambda count: joined(count + 1) if config.warmup_steps else joined(count)


def path_of(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def trainable(config: TrainConfig, params) -> dict:
    """A tree of bools. What no loss reaches is frozen, so that decay cannot wear it away: the
    indexer in stage "dense" or without its loss, all else in stage "warmup", the MTP modules
    without theirs.
    """
    pattern = re.compile(config.trainable)

    def one(path, _):
        name = path_of(path)
        if "indexer" in name.split("/"):
            reached = config.stage != "dense" and config.indexer_weight > 0
        else:
            reached = config.stage != "warmup"
        used = config.mtp_weight > 0 or not name.startswith("mtp_")
        return reached and used and pattern.search(name) is not None

    mask = jax.tree_util.tree_map_with_path(one, params)
    if not any(jax.tree.leaves(mask)):
        indexer = (
            " (this stage trains the indexer alone: model.indexer.n_heads must not be 0)"
            if config.stage == "warmup"
            else ""
        )
        raise UserError(
            f"train.trainable = {config.trainable!r}: matches no parameter that stage {config.stage!r} trains{indexer}"
        )
    return mask


def decays(params) -> dict:
    """Weight decay falls on matrices, not on the scales and biases of norms, the taps of a
    convolution or the rates of a decay.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in PER_CHANNEL, params)


def is_matrix(params) -> dict:
    """What Muon is for: matrices between hidden states. Embedding, output head, norms, biases and
    taps are AdamW's.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in (*PER_CHANNEL, "embedding", "head"), params
    )


def matrix_axes(params) -> dict:
    """The axes a matrix sums over and those it writes to, all heads together. Layers and experts
    are stacked: each of theirs is a matrix of its own.
    """

    def one(path, leaf):
        keys = path_of(path).split("/")
        stacked = (
            keys[0].startswith("layers_")
            + (keys[-2] == "moe" and keys[-1] in ("gate", "up", "down"))
            + (keys[-1] == "merge")
        )
        inputs = 2 if keys[-1] == "out" else 1
        axes = tuple(range(stacked, leaf.ndim))
        return MuonDimensionNumbers(axes[:inputs], axes[inputs:])

    return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101); or Muon for matrices, with updates as large as AdamW's (arXiv
    2502.16982, section 2.2), and AdamW for the rest.

    Frozen parameters have no moments and do not count in the gradient's norm.
    """
    rate, decay = schedule(config), config.weight_decay
    method = optax.adamw(rate, b1=config.beta1, b2=config.beta2, weight_decay=decay, mask=decays)
    if config.optimizer == "muon":
        orthogonal = muon(
            rate,
            NEWTON_SCHULZ,
            beta=MUON_MOMENTUM,
            consistent_rms=MUON_RMS,
            weight_decay=decay,
            muon_weight_dimension_numbers=matrix_axes,
        )
        method = optax.transforms.partition({True: orthogonal, False: method}, is_matrix)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.transforms.partition(
        {True: optax.chain(clip, method), False: optax.set_to_zero()},
        lambda params: trainable(config, params),
    )
