"""Attention over chosen keys on an NVIDIA Hopper GPU: kernels/sparse_attention.py says what it is,
this is the third implementation of it.

Pallas with Mosaic GPU. A block of BLOCK rows (queries; keys in the pass for dk and dv) belongs to
one program of three warpgroups: two compute, ROWS rows each, and the third only fetches. It brings
the tiles of the other side, those alone in which some row of the block has a key, by TMA into a
ring in shared memory; barriers say when a tile has landed and when both have done with it. Products
are wgmma, with the probabilities as left operand straight from registers.

A kernel wants the bits of a row side by side, 32 to a word, and the words of neighbouring rows next
to each other, so that a thread reads the few words of its
two rows and nothing else: kernels/bitmask.py rearranges its own, along keys or along queries. The
backward pass makes the probabilities again in two kernels, one that sums over keys (dq) and one
over queries (dk, dv): no atomics, so the same inputs give the same bits.

Interpreted on a CPU everything is as on the device but wgmma itself, in whose place the same
product is a plain one (docs/gpu.md). Never run on a GPU so far.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from errors import UserError
from kernels.bitmask import BITS, along_keys, along_queries
from kernels.reference import MASKED
from kernels.tiles import F32, INITIAL_MAX, dot, padded

ROWS = 64  # of a warpgroup: those of one wgmma
GROUPS = 2  # warpgroups that compute
BLOCK = GROUPS * ROWS
COMPUTING, FETCHING = 240, 24  # registers of a thread: together the 65,536 of a multiprocessor
SHARED_BYTES = 227 * 1024  # of shared memory that a program may have on Hopper
KEPT_BYTES = 3072  # of it for barriers, what is reduced across warps, and alignment
# columns of 16 bits in the 128 bytes of a swizzle: head widths are padded to multiples of it
LANE = 64
LOG2E = math.log2(math.e)


class Tiles(NamedTuple):
    """How the other side is cut, 64 or 128 at a time: keys of a tile in the forward pass; keys (dq)
    or queries (dk, dv) in the backward one.
    """

    forward: int = 128
    backward: int = 64
    interpret: Any = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_gpu(
    q_BNTH: Array, k_BNSH: Array, v_BNSV: Array, bits_BTW: Array, tiles: Tiles = Tiles()
) -> tuple[Array, Array]:
    """The kernels.

    Args:
      q_BNTH, k_BNSH, v_BNSV: heads first; q scaled; bfloat16 or float16 (interpreted, float32 too).
        Padded to multiples of 64, widths H of keys and V of values
        have room for 3 H + 2 V <= 880: keys of 192 with values of 128, 128 with 192, 64 with 320,
        but no 192 with 192.
      bits_BTW: each query's keys, see kernels/bitmask.py.

    Returns:
      out_BNTV of v's dtype, and lse_BNT float32; both 0 for a query without keys.

    Raises TypeError for another dtype: wgmma multiplies no float32. Raises UserError for wider
    heads.
    """
    return _forward(q_BNTH, k_BNSH, v_BNSV, bits_BTW, tiles)[0]


def held_first(words_BwR: Array, tile: int) -> tuple[Array, Array]:
    """For each block of BLOCK rows its tiles, those with a bit first and in order, [B, R / BLOCK,
    tiles], and how many have one, [B, R / BLOCK]; int32.
    """
    B, w, R = words_BwR.shape
    held_Bmn = jnp.any(
        words_BwR.reshape(B, w * BITS // tile, tile // BITS, R // BLOCK, BLOCK) != 0, axis=(2, 4)
    )
    held_Bnm = jnp.swapaxes(held_Bmn, 1, 2)
    return jnp.argsort(~held_Bnm, axis=-1, stable=True).astype(jnp.int32), jnp.sum(
        held_Bnm, axis=-1, dtype=jnp.int32
    )


class Fetched(NamedTuple):
    """A tile's part of one array: `wait` until it is there, and `release` it when done, so that
    another may come in its place.
    """

    refs: list
    landed: Any
    free: Any

    def wait(self):
        """The first ref, for wgmma to read."""
        plgpu.barrier_wait(self.landed)
        return self.refs[0]

    def rows(self, which: int) -> list[Array]:
        """Those of a ref, in registers."""
        return [self.refs[which][at] for at in range(self.refs[which].shape[0])]

    def release(self, *, read: bool = False):
        """`read`: into registers. What TMA writes next comes behind such a read only where a fence
        is between.
        """
        if read:
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.free)


def _run(
    body,
    name: str,
    fixed: Sequence[Array],
    moving: Sequence[Array],
    beside: Sequence[Array],
    words_BwR: Array,
    tile: int,
    results,
    interpret,
):
    """Runs `body` for each block of rows, with its tiles.

    Args:
      body: called by each computing warpgroup as body(mine, each): `mine` the refs of its rows of
        `fixed`; each(step, carry) -> carry calls
        step(tile, carry) in order for the block's tiles, where `tile` has a Fetched for each of
        `moving`, the first with `beside` and the words of the warpgroup's rows behind it; returns
        its rows of the results.
      fixed: [B, N, rows, ...] of the block's side.
      moving, beside: [B, N, rows, width] and [B, N, rows] of the other side.
      words_BwR: the set, 32 rows of the other side in a word and the block's rows last.
      tile: rows of the other side.
      results: of the block's side. Which operand (of `fixed`, then `moving`) has the width and type
        of each, and the place in shared memory from which it
        leaves; None for a float32 a row.
    """
    B, N, R = fixed[0].shape[:3]
    shapes = [which if which is None else [*fixed, *moving][which] for which in results]
    order_Bnm, count_Bn = held_first(words_BwR, tile)
    homes = [_shared((GROUPS, ROWS), x) for x in fixed]
    a_stage = [[_shared((tile,), x)] for x in moving]
    a_stage[0] += [_shared((1, tile), x) for x in beside] + [
        _Shared((tile // BITS, BLOCK), jnp.int32)
    ]
    stages = (SHARED_BYTES - KEPT_BYTES - sum(home.bytes for home in homes)) // sum(
        home.bytes for part in a_stage for home in part
    )
    if stages < 2:
        widths = sorted({x.shape[3] for x in (*fixed, *moving) if x.ndim == 4})
        raise UserError(
            f"model.attention_form = 'tiles': heads as wide as {widths} leave no room for two tiles in a GPU's shared memory; take 'chunks'"
        )
    stages = min(stages, 4)

    def kernel(order_ref, count_ref, words_ref, *refs):
        fixed_refs, refs = refs[: len(fixed)], refs[len(fixed) :]
        moving_refs, refs = refs[: len(moving)], refs[len(moving) :]
        beside_refs, refs = refs[: len(beside)], refs[len(beside) :]
        result_refs, (homes, ring, column, arrived, landed, free, done) = (
            refs[: len(results)],
            refs[len(results) :],
        )
        b, n, group = lax.axis_index("b"), lax.axis_index("n"), lax.axis_index("group")
        block = (
            R // BLOCK - 1 - lax.axis_index("block")
        )  # under a causal mask the last ones have most to do: first
        steps = count_ref[b, block]

        def slot(at):
            return lax.rem(at, jnp.int32(stages))

        @pl.when(group < GROUPS)
        def _():
            plgpu.set_max_registers(COMPUTING, action="increase")
            rows = pl.ds(block * BLOCK + group * ROWS, ROWS)
            mine = [home.at[group] for home in homes]
            for ref, home in zip(fixed_refs, mine, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[b, n, rows], home, arrived.at[group])
            plgpu.barrier_wait(arrived.at[group])

            def each(step, carry):
                def one(at, carry):
                    parts = [[place.at[slot(at)] for place in part] for part in ring]
                    parts[0][-1] = parts[0][-1].at[:, pl.ds(group * ROWS, ROWS)]
                    return step(
                        [
                            Fetched(part, one.at[slot(at)], other.at[slot(at)])
                            for part, one, other in zip(parts, landed, free, strict=True)
                        ],
                        carry,
                    )

                return lax.fori_loop(0, steps, one, carry)

            values = body(mine, each)
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)  # the ring is free too
            places = mine + [part[0].at[group, pl.ds(0, ROWS)] for part in ring]
            for which, value, ref in zip(results, values, result_refs, strict=True):
                place = column.at[group] if which is None else places[which]
                place[...] = value.astype(ref.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(place, ref.at[b, n, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == GROUPS)
        def _():
            plgpu.set_max_registers(FETCHING, action="decrease")

            @pl.loop(0, steps)
            def _(at):
                which = order_ref[b, block, at]
                there = pl.ds(which * tile, tile)
                words = words_ref.at[
                    b, pl.ds(which * (tile // BITS), tile // BITS), pl.ds(block * BLOCK, BLOCK)
                ]
                sources = [[ref.at[b, n, there]] for ref in moving_refs]
                sources[0] += [ref.at[b, n, pl.ds(0, 1), there] for ref in beside_refs] + [words]
                for refs, places, barrier, done in zip(sources, ring, landed, free, strict=True):

                    @pl.when(at >= stages)
                    def _(done=done):
                        plgpu.barrier_wait(done.at[slot(at)])

                    for ref, place in zip(refs, places, strict=True):
                        plgpu.copy_gmem_to_smem(ref, place.at[slot(at)], barrier.at[slot(at)])

            @pl.loop(jnp.maximum(steps, stages), steps + stages)
            def _(at):  # the last tiles too must be done with before this warpgroup may end
                for done in free:
                    plgpu.barrier_wait(done.at[slot(at)])

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((B, N, R), F32)
            if x is None
            else jax.ShapeDtypeStruct((B, N, R, x.shape[3]), x.dtype)
            for x in shapes
        ],
        scratch_types=[
            [home.ref() for home in homes],
            [
                [home._replace(shape=(stages, *home.shape)).ref() for home in part]
                for part in a_stage
            ],
            plgpu.SMEM((GROUPS, ROWS), F32),
            plgpu.Barrier(num_arrivals=len(fixed), num_barriers=GROUPS),
            [plgpu.Barrier(num_arrivals=len(part), num_barriers=stages) for part in a_stage],
            [plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages) for _ in a_stage],
            plgpu.Barrier(num_arrivals=GROUPS),
        ],
        grid=(B, N, R // BLOCK),
        grid_names=("b", "n", "block"),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=512,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=interpret,
    )(order_Bnm, count_Bn, words_BwR, *fixed, *moving, *(x[:, :, None] for x in beside))


class _Shared(NamedTuple):
    """A place in shared memory."""

    shape: tuple[int, ...]
    dtype: Any
    matrix: bool = False  # an operand of wgmma

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def ref(self):
        tiling = (
            plgpu.TilingTransform((8, 128 // jnp.dtype(self.dtype).itemsize)),
            plgpu.SwizzleTransform(128),
        )
        return plgpu.SMEM(self.shape, self.dtype, transforms=tiling if self.matrix else ())


def _shared(rows: tuple[int, ...], x: Array) -> _Shared:
    """For so many rows of an array [B, N, rows, width] or [B, N, rows]."""
    return _Shared((*rows, *x.shape[3:]), x.dtype, matrix=x.ndim == 4)


def _read(ref) -> Array:
    """Interpreted: what wgmma would read, which needs no fence where this does."""
    x = ref[...]
    plgpu.commit_smem()
    return x


def _product(a_ref, b_ref, interpret) -> Array:
    """a b^T of two tiles in shared memory, float32."""
    if interpret:
        return dot(_read(a_ref), _read(b_ref), (1, 1))

    def multiply(sum_ref):
        plgpu.wgmma(sum_ref, a_ref, b_ref.transpose((1, 0)))
        return sum_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((a_ref.shape[0], b_ref.shape[0]), F32))


def _plus_product(total: Array, a: Array, b_ref, interpret) -> Array:
    """total + a b, of a tile in registers and one in shared memory."""
    if interpret:
        return total + dot(a, _read(b_ref), (1, 0))
    return pl.run_state(lambda sum_ref: plgpu.wgmma(sum_ref, a, b_ref))(plgpu.ACC.init(total))


def _among(words_R: Sequence[Array], columns: int) -> Array:
    """Whether the bit of a row and column is set; a word for each 32 columns: bool [R, columns]."""
    shape = (ROWS, columns)
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    words = [lax.broadcast_in_dim(word_R, shape, (0,)) for word_R in words_R]
    word = words[-1]
    for at in reversed(range(len(words) - 1)):
        word = lax.select(column < BITS * (at + 1), words[at], word)
    # The compiler knows which columns a thread has but for the last three bits: those are shifted
    # away, once a word, and the rest is a constant.
    place = lax.shift_left(jnp.full(shape, 1, jnp.int32), column & (BITS - 8))
    return (lax.shift_right_logical(word, column & 7) & place) != 0


def _probabilities(logits: Array, lse: Array, among: Array) -> Array:
    """Again, from the logits and their `lse` in base 2, which is spread like them."""
    return jnp.exp2(lax.select(among, logits * LOG2E - lse, jnp.full(logits.shape, MASKED, F32)))


def _down(x_R: Array, like: Array) -> Array:
    """A number a row, to all columns."""
    return lax.broadcast_in_dim(x_R, like.shape, (0,))


def _across(x_K: Array, like: Array) -> Array:
    """A number a column, to all rows."""
    return lax.broadcast_in_dim(x_K, like.shape, (1,))


def _operands(tiles: Tiles, rows: dict[str, Array]) -> dict[str, Array]:
    """Arrays [B, N, rows, width] or [B, N, rows] with their rows padded to multiples of BLOCK, and
    their widths to multiples of LANE.
    """
    found = {}
    for name, x in rows.items():
        if x.ndim == 4 and not tiles.interpret and x.dtype not in (jnp.bfloat16, jnp.float16):
            raise TypeError(
                f"attend_gpu: {name} is {x.dtype}; the tensor cores take bfloat16 or float16"
            )
        x = padded(x, 2, -(-x.shape[2] // BLOCK) * BLOCK)
        found[name] = padded(x, 3, -(-x.shape[3] // LANE) * LANE) if x.ndim == 4 else x
    return found


def _forward(q_BNTH, k_BNSH, v_BNSV, bits_BTW, tiles: Tiles):
    T, V = q_BNTH.shape[2], v_BNSV.shape[3]
    q, k, v = _operands(tiles, {"q": q_BNTH, "k": k_BNSH, "v": v_BNSV}).values()

    def body(mine, each):
        (q_ref,) = mine

        def step(tile, carry):
            (k, v), (mixed_RV, largest_R, total_R) = tile, carry
            logits_RK, among_RK = (
                _product(q_ref, k.wait(), tiles.interpret),
                _among(k.rows(1), tiles.forward),
            )
            k.release(read=True)
            logits_RK = lax.select(among_RK, logits_RK, jnp.full(logits_RK.shape, MASKED, F32))
            before_R, largest_R = largest_R, jnp.maximum(largest_R, jnp.max(logits_RK, axis=1))
            shrink_R = jnp.exp2((before_R - largest_R) * LOG2E)
            p_RK = jnp.exp2(logits_RK * LOG2E - _down(largest_R * LOG2E, logits_RK))
            total_R = total_R * shrink_R + jnp.sum(p_RK, axis=1)
            mixed_RV = _plus_product(
                mixed_RV * _down(shrink_R, mixed_RV),
                p_RK.astype(v_BNSV.dtype),
                v.wait(),
                tiles.interpret,
            )
            v.release()
            return mixed_RV, largest_R, total_R

        first = (
            jnp.zeros((ROWS, v.shape[3]), F32),
            jnp.full((ROWS,), INITIAL_MAX, F32),
            jnp.zeros((ROWS,), F32),
        )
        mixed_RV, largest_R, total_R = each(step, first)
        some_R = total_R > 0
        total_R = jnp.where(some_R, total_R, 1.0)
        return mixed_RV / _down(total_R, mixed_RV), jnp.where(
            some_R, largest_R + jnp.log(total_R), 0.0
        )

    words_BwT = along_keys(padded(bits_BTW, 1, q.shape[2]))
    out, lse = _run(
        body,
        "sparse_attention",
        [q],
        [k, v],
        [],
        words_BwT,
        tiles.forward,
        [2, None],
        tiles.interpret,
    )
    out_BNTV, lse_BNT = out[:, :, :T, :V], lse[:, :, :T]
    return (out_BNTV, lse_BNT), (q_BNTH, k_BNSH, v_BNSV, bits_BTW, out_BNTV, lse_BNT)


def _backward(tiles: Tiles, saved, cotangents):
    q_BNTH, k_BNSH, v_BNSV, bits_BTW, out_BNTV, lse_BNT = saved
    dout_BNTV, dlse_BNT = cotangents
    (T, H), (S, V) = q_BNTH.shape[2:], v_BNSV.shape[2:]
    delta_BNT = jnp.sum(out_BNTV.astype(F32) * dout_BNTV.astype(F32), axis=-1) - dlse_BNT
    rows = {
        "q": q_BNTH,
        "k": k_BNSH,
        "v": v_BNSV,
        "dout": dout_BNTV,
        "lse": lse_BNT * LOG2E,
        "delta": delta_BNT,
    }
    q, k, v, dout, lse, delta = _operands(tiles, rows).values()

    def dq_body(mine, each):
        q_ref, dout_ref, lse_ref, delta_ref = mine
        lse_R, delta_R = lse_ref[...], delta_ref[...]

        def step(tile, dq_RH):
            k, v = tile
            logits_RK = _product(q_ref, k.wait(), tiles.interpret)
            p_RK = _probabilities(
                logits_RK, _down(lse_R, logits_RK), _among(k.rows(1), tiles.backward)
            )
            dp_RK = _product(dout_ref, v.wait(), tiles.interpret)
            v.release()
            dlogits_RK = p_RK * (dp_RK - _down(delta_R, dp_RK))
            dq_RH = _plus_product(
                dq_RH, dlogits_RK.astype(k_BNSH.dtype), k.refs[0], tiles.interpret
            )
            k.release(read=True)
            return dq_RH

        return (each(step, jnp.zeros(q_ref.shape, F32)),)

    def dkv_body(mine, each):
        k_ref, v_ref = mine

        def step(tile, carry):
            (q, dout), (dk_RH, dv_RV) = tile, carry
            logits_RQ = _product(k_ref, q.wait(), tiles.interpret)
            p_RQ = _probabilities(
                logits_RQ, _across(q.rows(1)[0], logits_RQ), _among(q.rows(3), tiles.backward)
            )
            p_RQ = lax.optimization_barrier(
                p_RQ.astype(dout_BNTV.dtype)
            )  # rounded for both its uses, two to a register: those are short here
            dp_RQ = _product(v_ref, dout.wait(), tiles.interpret)
            dv_RV = _plus_product(dv_RV, p_RQ, dout.refs[0], tiles.interpret)
            dout.release()
            dlogits_RQ = p_RQ.astype(F32) * (dp_RQ - _across(q.rows(2)[0], dp_RQ))
            dk_RH = _plus_product(
                dk_RH, dlogits_RQ.astype(q_BNTH.dtype), q.refs[0], tiles.interpret
            )
            q.release(read=True)
            return dk_RH, dv_RV

        return each(step, (jnp.zeros(k_ref.shape, F32), jnp.zeros(v_ref.shape, F32)))

    bits_BTW = padded(bits_BTW, 1, q.shape[2])
    words_BwT, words_BwS = along_keys(bits_BTW), along_queries(bits_BTW)[..., : k.shape[2]]
    (dq,) = _run(
        dq_body,
        "sparse_attention_dq",
        [q, dout, lse, delta],
        [k, v],
        [],
        words_BwT,
        tiles.backward,
        [0],
        tiles.interpret,
    )
    dk, dv = _run(
        dkv_body,
        "sparse_attention_dkv",
        [k, v],
        [q, dout],
        [lse, delta],
        words_BwS,
        tiles.backward,
        [0, 1],
        tiles.interpret,
    )
    return dq[:, :, :T, :H], dk[:, :, :S, :H], dv[:, :, :S, :V], None


attend_gpu.defvjp(_forward, _backward)
