"""The smallest set of keys that holds a given share of a softmax (Twilight, arXiv 2502.02770): its threshold by counting, without a sort.

The search is the one for the k best (model/indexer.py: select_topk) with weights exp(score - largest) in place of ones: bit by bit a bound is raised as long as
what is at or above it weighs enough. It begins with every bit open: no assumption is made of where the largest weight is. (The paper's released code takes the
first token's for the upper end of its bracket.)
"""

import jax
import jax.numpy as jnp
from jax import Array

from model.indexer import MASKED, largest_with

WEIGHT_BITS = 30  # of a float32 up to 1, without its sign: from the largest down to 0


def keep_mass(scores_BS: Array, among_BS: Array, mass: float) -> Array:
    """Of the keys in `among` the fewest whose softmax weights add up to `mass` of theirs all. Of equal weights the earlier key goes first. No gradient.

    Args:
      scores_BS: float32 logits, of any leading axes.
      mass: in (0, 1]; at 1 all are kept.

    Returns: bool, no key outside `among`. A row that has any keeps at least one.
    """
    if mass == 1:
        return among_BS
    with jax.named_scope("keep_mass"):
        scores_BS = jnp.where(among_BS, jax.lax.stop_gradient(scores_BS), MASKED)
        weight_BS = jnp.where(among_BS, jnp.exp(scores_BS - jnp.max(scores_BS, axis=-1, keepdims=True)), 0.0)
        rank_BS = jax.lax.bitcast_convert_type(weight_BS, jnp.uint32)  # of floats that are not negative the bits are in order

        def weigh(chosen_BS: Array) -> Array:
            return jnp.sum(jnp.where(chosen_BS, weight_BS, 0.0), axis=-1, keepdims=True)

        wanted_B1 = mass * weigh(among_BS)
        level_B1 = largest_with(lambda bound_B1: weigh(rank_BS >= bound_B1) >= wanted_B1, wanted_B1.shape, bits=WEIGHT_BITS)
        tied_BS = (rank_BS == level_B1) & among_BS
        each_B1 = jax.lax.bitcast_convert_type(level_B1, jnp.float32)
        ties_B1 = jnp.maximum(jnp.ceil((wanted_B1 - weigh(rank_BS > level_B1)) / each_B1), 1.0)
        return among_BS & ((rank_BS > level_B1) | (tied_BS & (jnp.cumsum(tied_BS, axis=-1) <= ties_B1)))
