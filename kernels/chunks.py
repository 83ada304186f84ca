"""Works through one axis of many arrays, a chunk at a time.

So no intermediate has the axis' full length.

    map_chunks(attend, (q_BTNH, segments_BT), 512)    attend sees [B, 512, N, H] and [B, 512]

The axis is padded with zeros to whole chunks; the padding is cut off the results. A chunk is one
step of `jax.lax.scan`: chunks run in order, and are compiled once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels.tiles import padded


def map_chunks(
    function: Callable[..., Any],
    arrays: tuple,
    size: int,
    *,
    axes: Any = 1,
    out_axes: Any = 1,
    checkpoint: bool = False,
) -> Any:
    """Applies a function to every chunk of some arrays and joins the results.

    Args:
      function: takes one chunk of each of `arrays`, as positional arguments; returns a pytree.
      arrays: pytrees of arrays with one common length T along `axes`.
      size: the length of a chunk; T need not be a multiple.
      axes: which axis of each array is cut: one number, or a tree that is a prefix of `arrays`,
        as `jax.vmap`'s in_axes.
      out_axes: along which axis of each result the chunks are joined, in the same form.
      checkpoint: whether the backward pass computes a chunk again instead of keeping its
        intermediates.

    Returns: the function's results, of length T along `out_axes`.
    """
    _, results = scan_chunks(
        lambda _, *chunks: (None, function(*chunks)),
        None,
        arrays,
        size,
        axes=axes,
        out_axes=out_axes,
        checkpoint=checkpoint,
    )
    return results


def scan_chunks(
    function: Callable[..., tuple[Any, Any]],
    carry: Any,
    arrays: tuple,
    size: int,
    *,
    axes: Any = 1,
    out_axes: Any = 1,
    checkpoint: bool = False,
) -> tuple[Any, Any]:
    """Applies a function to every chunk in order and hands a value on from chunk to chunk.

    Args:
      function: (carry, one chunk of each of `arrays` ...) -> (carry, results), as `jax.lax.scan`
        wants it.
      carry: the value that the first chunk receives.
      arrays, size, axes, out_axes, checkpoint: see `map_chunks`.

    Returns: the carry after the last chunk, and the results of length T along `out_axes`.
    """
    length = _length(arrays, axes)
    cut = jax.tree.map(
        lambda axis, tree: jax.tree.map(lambda x: cut_chunks(x, size, axis), tree), axes, arrays
    )

    def step(carry, chunks):
        return function(carry, *chunks)

    step = jax.checkpoint(step, prevent_cse=False) if checkpoint else step
    carry, results = lax.scan(step, carry, cut)
    joined = jax.tree.map(
        lambda axis, tree: jax.tree.map(lambda x: join_chunks(x, length, axis), tree),
        out_axes,
        results,
    )
    return carry, joined


def cut_chunks(x: Array, size: int, axis: int = 1) -> Array:
    """Cuts [..., T, ...] into [n, ..., size, ...]; zeros fill the last chunk."""
    chunks = -(-x.shape[axis] // size)
    x = padded(x, axis, chunks * size)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :]), axis, 0)


def join_chunks(x: Array, length: int, axis: int = 1) -> Array:
    """Joins the chunks [n, ..., size, ...] to [..., length, ...], without the padding."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return x[(slice(None),) * axis + (slice(length),)]


def _length(arrays: Any, axes: Any) -> int:
    """Returns the common length T of the axes that are cut."""
    lengths = set()
    jax.tree.map(
        lambda axis, tree: lengths.update(x.shape[axis] for x in jax.tree.leaves(tree)),
        axes,
        arrays,
    )
    (length,) = lengths
    return length
