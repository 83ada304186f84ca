"""The lightning indexer: its scores, what it selects, the loss that teaches it, and the wall
between it and the trunk.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.reference import indexer_kl, indexer_scores, select_topk
from model.attention.reference import attend_expanded, indexer_stats
from model.heads import token_logprobs
from model.segments import shift_left
from tests import tiny
from tests.model.test_attention_reference import TOPK, inputs


class Scores(chex.TestCase):
    # chex makes `variants` by toolz.curry, which to type checkers is no function.
    @chex.variants(with_jit=True, without_jit=True)  # pyright: ignore[reportCallIssue]
    def test_equation(self):
        """arXiv 2512.02556, eq. 1, sum by sum."""
        indexer = inputs(2, 5)[3]
        (q, w), k = (np.asarray(x) for x in indexer.query), np.asarray(indexer.k_BSC)
        expected = np.zeros((2, 5, 5))
        for b, t, s, i in np.ndindex(2, 5, 5, q.shape[2]):
            expected[b, t, s] += w[b, t, i] * max(q[b, t, i] @ k[b, s], 0)
        np.testing.assert_allclose(
            self.variant(indexer_scores)(q, k, w), expected, rtol=1e-5, atol=1e-6
        )  # float32 sums of a few terms


def brute_force(scores_S, allowed_S, topk):
    """By score, then by position."""
    order = sorted(np.flatnonzero(allowed_S), key=lambda s: (-scores_S[s], s))
    selected = np.zeros(len(scores_S), bool)
    selected[order[:topk]] = True
    return selected


class Selection(chex.TestCase):
    # chex makes `variants` by toolz.curry, which to type checkers is no function.
    @chex.variants(with_jit=True, without_jit=True)  # pyright: ignore[reportCallIssue]
    def test_brute_force(self):
        """Scores of four values, two of them zeros of either sign: most are tied. And rows that
        allow fewer than topk, or none.
        """
        rng = np.random.default_rng(0)
        scores_BTS = rng.choice(np.asarray([-1.0, -0.0, 0.0, 1.0], np.float32), size=(8, 6, 12))
        allowed_BTS = rng.random((8, 6, 12)) < rng.random((8, 6, 1))
        selected = self.variant(lambda s, a: select_topk(s, a, TOPK))(scores_BTS, allowed_BTS)
        expected = [
            [brute_force(scores_BTS[b, t], allowed_BTS[b, t], TOPK) for t in range(6)]
            for b in range(8)
        ]
        np.testing.assert_array_equal(selected, expected)

    def test_topk_beyond_the_keys_selects_what_is_allowed(self):
        allowed = jnp.asarray([[[True, False, True]]])
        chex.assert_trees_all_equal(select_topk(jnp.zeros((1, 1, 3)), allowed, 7), allowed)


def keys_of(scores_BTS, segments_BT, topk):
    """[(b, t, keys)] of every query with any: its segment's past, and of that the topk best (None:
    all).
    """
    found = []
    for b, t in np.ndindex(segments_BT.shape):
        allowed = (
            (segments_BT[b] == segments_BT[b, t])
            & (segments_BT[b, t] > 0)
            & (np.arange(segments_BT.shape[1]) <= t)
        )
        attended = allowed if topk is None else brute_force(scores_BTS[b, t], allowed, topk)
        found += [(b, t, np.flatnonzero(attended))] if allowed.any() else []
    return found


def naive_kl(indexer, q, k, keys):
    """The loss as arXiv 2512.02556, eq. 3 (all keys) and 4 (the selected ones) write it: a query at
    a time, over its own keys, differentiated by jax.
    """
    scores_BTS = indexer_scores(indexer.query.q_BTIC, indexer.k_BSC, indexer.query.w_BTI)
    total = 0.0
    for b, t, attended in keys:
        heads_NS = jax.nn.softmax(jnp.einsum("nh,snh->ns", q[b, t], k[b, attended]), axis=-1)
        target_S = jnp.sum(heads_NS, axis=0) / jnp.sum(heads_NS)
        total += jnp.sum(
            target_S * (jnp.log(target_S) - jax.nn.log_softmax(scores_BTS[b, t, attended]))
        )
    return total


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_kl_is_the_naive_one(stage):
    """In value and in its gradient, by chunks of 4 queries: float32 sums of a few terms each."""
    q, k, v, indexer = inputs(2, 9)
    segments_BT = np.asarray([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2, 2, 0]])
    scores_BTS = np.asarray(indexer_scores(*indexer.query[:1], indexer.k_BSC, indexer.query.w_BTI))
    keys = keys_of(scores_BTS, segments_BT, 3 if stage == "sparse" else None)

    def fast(indexer):
        return attend_expanded(
            q,
            k,
            v,
            jnp.asarray(segments_BT),
            indexer,
            stage=stage,
            topk=3,
            query_chunk=4,
            causal_parts=1,
        )[1].kl

    found, expected = (
        jax.jit(jax.value_and_grad(fast))(indexer),
        jax.jit(jax.value_and_grad(lambda i: naive_kl(i, q, k, keys)))(indexer),
    )
    tiny.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert tiny.tree_max(expected[1]) > 0.01


def test_kl_of_the_target_itself_is_zero():
    """Scores that are the target's logarithm, up to a constant; keys outside do not count, nor do
    queries without any.
    """
    target_BTS = jnp.asarray([[[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    scores_BTS = jnp.where(target_BTS > 0, jnp.log(jnp.maximum(target_BTS, 1e-9)), 9.0) + 3.0
    kl_BT = indexer_kl(target_BTS, scores_BTS, target_BTS > 0)
    tiny.assert_close(kl_BT, jnp.zeros((1, 2)), atol=1e-6)


@pytest.mark.heavy
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_the_wall(stage):
    """What is predicted does not move the indexer, and the indexer's loss moves nothing else: zero,
    not small.
    """
    config = tiny.model_config()
    variables, batch = tiny.variables(config), tiny.batch_of()

    @jax.jit
    def jacobian(params):
        def losses(params):
            output = tiny.output_of(config, variables | {"params": params}, batch, stage)
            hidden = (output.hidden_BTD, *output.mtp_hidden)
            lm = sum(
                jnp.sum(
                    token_logprobs(config, params, hidden_BTD, shift_left(batch["tokens"], 1))[0]
                )
                for hidden_BTD in hidden
            )
            return jnp.stack(
                [lm + jnp.sum(output.stats.router.balance), jnp.sum(output.stats.indexer.kl)]
            )

        return jax.jacrev(losses)(params)

    leaves = jax.tree.leaves_with_path(jacobian(variables["params"]))
    assert len(leaves) == len(jax.tree.leaves(variables["params"]))
    for path, (lm, kl) in leaves:
        zero, live = (lm, kl) if "indexer" in jax.tree_util.keystr(path) else (kl, lm)
        assert not jnp.any(zero), (
            f"{jax.tree_util.keystr(path)} moves by a loss that is not its own"
        )
        assert jnp.any(live), f"{jax.tree_util.keystr(path)} is reached by nothing"


def test_recall():
    """An indexer whose scores are the attention itself finds the topk largest probabilities: no
    selection holds more mass. One with the order reversed finds the least. Queries with topk keys
    or fewer are not counted.
    """
    q, k, _, _ = inputs(2, 9)
    allowed_BTS = jnp.broadcast_to(jnp.tril(jnp.ones((9, 9), bool)), (2, 9, 9))
    logits_BNTS = jnp.where(allowed_BTS[:, None], 8 * jnp.einsum("BTNH,BSNH->BNTS", q, k), -jnp.inf)
    target_BTS = jnp.mean(jax.nn.softmax(logits_BNTS), axis=1)
    topk, counted = 3, range(3, 9)  # of t + 1 candidates
    best, worst = (
        indexer_stats(target_BTS, scores_BTS, allowed_BTS, "warmup", topk)
        for scores_BTS in (target_BTS, -target_BTS)
    )
    ordered = [np.sort(target_BTS[b, t, : t + 1]) for b in range(2) for t in counted]
    assert float(best.recall) == pytest.approx(sum(row[-topk:].sum() for row in ordered), rel=1e-5)
    assert float(worst.recall) == pytest.approx(sum(row[:topk].sum() for row in ordered), rel=1e-5)
    assert float(best.recall_random) == pytest.approx(
        2 * sum(topk / (t + 1) for t in counted), rel=1e-6
    )
