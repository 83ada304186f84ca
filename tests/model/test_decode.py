"""Reading token by token, over latents, is the forward pass over the whole row."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from model.cache import Cache
from model.decode import last_of, prefill, read
from model.decode_weights import decode_weights
from model.heads import logits_of
from tests import tiny
from tests.tiny import T

PROMPTS = (16, 13, 7, 1)  # tokens of each row's prompt, padded on the right to the longest
STEPS = T - max(PROMPTS)
LAYOUT = (((1, T),),) * len(PROMPTS)
CHUNK, COUNTS = 5, ((5, 2, 0, 1), (3, 5, 1, 0), (0, 1, 5, 4), (0, 0, 2, 3))
# With this seed no choice of a key or expert is so close that weights 1e-6 off would turn it (with
# 0 one key is, by 1e-7).
SEED = 1

prefill = jax.jit(prefill, static_argnums=(0, 4, 5))
read = jax.jit(read, static_argnums=(0, 5))
step = jax.jit(tiny.decode_step, static_argnums=(0, 4))

CASES = {
    "dense, no gate, no query latent": (
        "dense",
        tiny.model_config(num_nextn_predict_layers=0, mla={"gate": "none", "q_lora_rank": 0}),
    ),
    "sparse, gate per head, no query latent": (
        "sparse",
        tiny.model_config(num_nextn_predict_layers=0, mla={"gate": "head", "q_lora_rank": 0}),
    ),
    "sparse, gate per element, query latent": (
        "sparse",
        tiny.model_config(num_nextn_predict_layers=0),
    ),
    "no convolution": (
        "sparse",
        tiny.model_config(num_nextn_predict_layers=0, canon_kernel_size=0),
    ),
    "hybrid": ("dense", dataclasses.replace(tiny.HYBRID, num_nextn_predict_layers=0)),
    "hybrid with a convolution": (
        "dense",
        dataclasses.replace(tiny.HYBRID, num_nextn_predict_layers=0, canon_kernel_size=3),
    ),
    "no indexer": (
        "dense",
        tiny.model_config(num_nextn_predict_layers=0, indexer={"n_heads": 0, "topk": 4}),
    ),
}


@functools.cache
def decoded(case: str, topk: int | None = None):
    """The cache after the last token, and logits [B, STEPS + 1, V] after the prompts and each
    token.
    """
    stage, config = CASES[case]
    if topk:
        config = tiny.model_config(num_nextn_predict_layers=0, indexer={"topk": topk})
    cache, logits_BV = prompts_read(config, stage)
    weights, found = decode_weights(config, tiny.variables(config), len(PROMPTS)), [logits_BV]
    for _ in range(STEPS):
        cache, logits_BV = step(config, weights, tokens_at(cache.length_B, 1)[:, 0], cache, stage)
        found.append(logits_BV)
    return cache, jnp.stack(found, axis=1)


def prompts_read(config, stage: str) -> tuple[Cache, jax.Array]:
    """The cache after the prompts, and the logits after them."""
    variables, count_B = tiny.variables(config), jnp.asarray(PROMPTS)
    tokens_BT = tokens_at(jnp.zeros_like(count_B), max(PROMPTS))
    cache, hidden_BD, _ = prefill(config, variables, tokens_BT, count_B, T, stage)
    return cache, logits_of(config, variables["params"], hidden_BD)


def tokens_at(start_B: jax.Array, width: int) -> jax.Array:
    """The tokens of each row from a place on, [B, width]."""
    tokens_BT = tiny.batch_of(LAYOUT, seed=SEED)["tokens"]
    return jnp.take_along_axis(tokens_BT, start_B[:, None] + jnp.arange(width), axis=1, mode="clip")


def expected_logits(case: str, stage: str | None = None) -> jax.Array:
    """Logits [B, STEPS + 1, V] of the whole rows, as `decoded` has them."""
    own_stage, config = CASES[case]
    batch = tiny.batch_of(LAYOUT, seed=SEED)
    logits_BTV = tiny.forward(config, tiny.variables(config), batch, stage or own_stage)[
        "logits_BTV"
    ]
    at_BT = jnp.asarray(PROMPTS)[:, None] - 1 + jnp.arange(STEPS + 1)
    return jnp.take_along_axis(logits_BTV, at_BT[..., None], axis=1)


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_decoding_is_the_forward_pass(case):
    """Rows of four lengths. Absorbed against expanded: products of float32 matrices in another
    order, logits of size 1.
    """
    tiny.assert_close(decoded(case)[1], expected_logits(case), atol=1e-4)


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_reading_by_chunks_is_reading_token_by_token(case):
    """Each row its own number of tokens at a time, from none on; then the logits after the last."""
    stage, config = CASES[case]
    variables = tiny.variables(config)
    weights = decode_weights(config, variables, len(PROMPTS))
    cache, _ = prompts_read(config, stage)
    hidden_BD = jnp.zeros((len(PROMPTS), config.hidden_size))
    for counts in COUNTS:
        count_B = jnp.asarray(counts)
        tokens_BT = tokens_at(cache.length_B, CHUNK)
        cache, hidden_BTD, *_ = read(config, weights, tokens_BT, count_B, cache, stage)
        hidden_BD = jnp.where(count_B[:, None] > 0, last_of(hidden_BTD, count_B), hidden_BD)
    chex.assert_trees_all_equal(cache.length_B, jnp.asarray(PROMPTS) + STEPS)
    logits_BV = logits_of(config, variables["params"], hidden_BD)
    tiny.assert_close(logits_BV, expected_logits(case)[:, -1], atol=1e-4)


@pytest.mark.parametrize("case", ["sparse, gate per element, query latent", "hybrid"])
def test_a_row_without_a_new_token_stays_as_it_is(case):
    """To the bit, whatever stands in its place of the batch."""
    stage, config = CASES[case]
    weights = decode_weights(config, tiny.variables(config), len(PROMPTS))
    before, _ = prompts_read(config, stage)
    after, *_ = read(config, weights, jnp.full((4, 1), 7), jnp.asarray([1, 0, 0, 1]), before, stage)
    kept = jnp.asarray([1, 2])
    chex.assert_trees_all_equal(after.take(kept), before.take(kept))
    moved = after.put(jnp.asarray([3, 4]), before.take(kept))  # the cache has no row 4
    chex.assert_trees_all_equal(moved.take(jnp.asarray([3])), before.take(kept[:1]))
    chex.assert_trees_all_equal(moved.take(kept), before.take(kept))


@pytest.mark.parametrize("case", ["sparse, gate per element, query latent", "no indexer"])
def test_the_cache_holds_latents_index_keys_and_recent_states_alone(case):
    config = CASES[case][1]
    cache, _ = decoded(case)
    width = config.indexer.head_dim if config.indexer.n_heads else 0
    per_layer = {
        (4, T, config.mla.kv_lora_rank + config.mla.qk_rope_head_dim),
        (4, T, width),
        (4, config.canon_kernel_size - 1, config.hidden_size),
    }
    assert len(cache.layers) == config.num_hidden_layers
    for layer in cache.layers:
        assert {leaf.shape for leaf in jax.tree.leaves(layer)} == per_layer
    assert len(jax.tree.leaves(cache)) == 3 * config.num_hidden_layers + 1
    chex.assert_trees_all_equal(cache.length_B, jnp.asarray(PROMPTS) + STEPS)


@pytest.mark.parametrize(
    "case", ["sparse, gate per element, query latent", "hybrid with a convolution"]
)
def test_a_step_writes_its_token_into_the_cache_it_is_given(case):
    """As launch.sample and launch.score decode: every array of the cache is the result's too, and
    gone afterwards.
    """
    stage, config = CASES[case]
    cache = jax.jit(lambda: Cache.empty(config, 4, T, stage))()
    given = decode_weights(config, tiny.variables(config), 4), jnp.arange(4), cache
    leaves = jax.tree.leaves(cache)
    program = tiny.jitted_step(config, stage).lower(*given).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in leaves)
    program(*given)
    assert all(leaf.is_deleted() for leaf in leaves)


def test_topk_of_everything_is_dense():
    """The same parameters, read sparsely with as many keys as slots, and densely; with 4 they
    differ.
    """
    case = "sparse, gate per element, query latent"
    dense = expected_logits(case, "dense")
    tiny.assert_close(decoded(case, topk=T)[1], dense, atol=1e-4)
    assert jnp.max(jnp.abs(decoded(case)[1] - dense)) > 0.1
