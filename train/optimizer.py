"""The optimizers and their schedule, by optax; what is trained, and what decays."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from errors import UserError
from model.sharding import Named, is_named
from train.config import TrainConfig

MUON_MOMENTUM = 0.95
# Five times the same coefficients (optax's own): given a row a step, optax scans over the steps;
# given one row it unrolls them for every matrix, and the quickstart's step takes a sixth longer to
# compile.
NEWTON_SCHULZ = ((3.4445, -4.775, 2.0315),) * 5
# The root mean square of an update at learning rate 1: about that of AdamW's (arXiv 2502.16982,
# section 2.2), so one rate serves both.
MUON_RMS = 0.2


def make_optimizer(config: TrainConfig, parameters: Any) -> optax.GradientTransformation:
    """Builds AdamW, or Muon for matrices and AdamW for the rest.

    AdamW is arXiv 1711.05101. Muon's updates are as large as AdamW's (arXiv 2502.16982, section
    2.2). Frozen parameters have no moments and do not count in the gradient's norm.

    Args:
      parameters: the tree of parameters in their boxes (`model.transformer.boxed_shapes`), which
        say how each is used: what decays, and what is a matrix over which axes.
    """
    boxes = {
        path_of(path): box
        for path, box in jax.tree_util.tree_leaves_with_path(parameters, is_leaf=is_named)
    }

    def for_each(choose: Callable[[Named], Any]) -> Callable[[Any], Any]:
        """Returns a function of a tree of some of the parameters: `choose` of the box of each."""
        return lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: choose(boxes[path_of(path)]), params
        )

    rate, decay = schedule(config), config.weight_decay
    method = optax.adamw(
        rate, b1=config.beta1, b2=config.beta2, weight_decay=decay, mask=for_each(decays)
    )
    if config.optimizer == "muon":
        orthogonal = muon(
            rate,
            NEWTON_SCHULZ,
            beta=MUON_MOMENTUM,
            consistent_rms=MUON_RMS,
            weight_decay=decay,
            muon_weight_dimension_numbers=for_each(matrix_axes),
        )
        method = optax.transforms.partition(
            {True: orthogonal, False: method}, for_each(is_hidden_matrix)
        )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.transforms.partition(
        {True: optax.chain(clip, method), False: optax.set_to_zero()},
        lambda params: trainable(config, params),
    )


def schedule(config: TrainConfig) -> optax.Schedule:
    """Builds the learning rate: linear warm-up, constant, cosine, constant.

    That is the shape of DeepSeek-V3's (arXiv 2412.19437, section 4.2).
    """
    peak = config.learning_rate
    cosine_steps = config.cosine_steps
    if cosine_steps == -1:
        cosine_steps = max(config.steps - config.warmup_steps - config.constant_steps, 0)
    cosine = optax.cosine_decay_schedule(peak, max(cosine_steps, 1), alpha=config.final_ratio)
    parts = [
        (optax.linear_schedule(0.0, peak, config.warmup_steps), config.warmup_steps),
        (optax.constant_schedule(peak), config.constant_steps),
        (cosine, cosine_steps),
    ]
    parts = [(part, steps) for part, steps in parts if steps]
    end = optax.constant_schedule(config.final_ratio * peak if cosine_steps else peak)
    boundaries = list(itertools.accumulate(steps for _, steps in parts))
    joined = optax.join_schedules([*(part for part, _ in parts), end], boundaries)
    # A step that starts at 0 would be wasted at learning rate 0: the schedule is read one step on.
    return lambda count: joined(count + 1) if config.warmup_steps else joined(count)


def path_of(path: Any) -> str:
    """Returns the path of a leaf as in checkpoints: "layers_0/block_0/attention/out"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def trainable(config: TrainConfig, params: Any) -> dict:
    """Returns a tree of bools, which parameters learn.

    What no loss reaches is frozen, so that decay cannot wear it away: the indexer in stage "dense"
    or without its loss, all else in stage "warmup", the MTP modules without theirs.

    Raises:
      UserError: nothing learns.
    """
    pattern = re.compile(config.trainable)

    def learns(path: Any, _: Any) -> bool:
        name = path_of(path[:-1] if config.lora else path)
        if is_indexer(name):
            reached = config.stage != "dense" and config.indexer_weight > 0
        else:
            reached = config.stage != "warmup"
        used = config.mtp_weight > 0 or not name.startswith("mtp_")
        return reached and used and pattern.search(name) is not None

    mask = jax.tree_util.tree_map_with_path(learns, params)
    if not any(jax.tree.leaves(mask)):
        indexer = ""
        if config.stage == "warmup":
            indexer = " (it trains the indexer alone: model.indexer.n_heads must not be 0)"
        raise UserError(
            f"train.trainable = {config.trainable!r}: matches no parameter that "
            f"stage {config.stage!r} trains{indexer}"
        )
    return mask


def is_indexer(name: str) -> bool:
    """Returns whether a parameter is one of an indexer, by its path (`path_of`)."""
    return "indexer" in name.split("/")


def decays(box: Named) -> bool:
    """Returns whether weight decay falls on a parameter.

    It falls on what is part of a matrix product, and not on the scales and biases of norms, the
    kernels of convolutions or the rates of a decay.
    """
    return not box.use.per_channel


def is_hidden_matrix(box: Named) -> bool:
    """Returns whether Muon trains a parameter: a matrix between hidden states.

    The embedding, the output head, norms, biases and convolution kernels are AdamW's.
    """
    return decays(box) and "vocab" not in box.names


def matrix_axes(box: Named) -> MuonDimensionNumbers:
    """Returns the axes that a matrix sums over and those that it writes to, all heads together.

    Layers and experts are stacked: each of theirs is a matrix of its own.
    """
    return MuonDimensionNumbers(*box.matrix_axes)
