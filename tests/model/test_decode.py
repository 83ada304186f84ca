"""Reading token by token, over latents, is the forward pass over the whole row."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from model.cache import Cache
from model.decode import decode_step, decode_weights, prefill
from tests import tiny
from tests.tiny import T

PROMPT = 16
PADDING = (0, 3, 9, 15)  # on the left: the last prompt is one token
LAYOUT = tuple(((0, n), (1, T - n)) for n in PADDING)
# With this seed no choice of a key or expert is so close that weights 1e-6 off would turn it (with
# 0 one key is, by 1e-7).
SEED = 1

prefill = jax.jit(prefill, static_argnums=(0, 4, 5))
step = jax.jit(decode_step, static_argnums=(0, 4))

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
    """The cache after the last token, and logits [B, T - PROMPT + 1, V] after the prompt and each
    token.
    """
    stage, config = CASES[case]
    if topk:
        config = tiny.model_config(num_nextn_predict_layers=0, indexer={"topk": topk})
    variables, batch = tiny.variables(config), tiny.batch_of(LAYOUT, seed=SEED)
    cache, logits_BV = prefill(
        config, variables, batch["tokens"][:, :PROMPT], batch["segments"][:, :PROMPT], T, stage
    )
    weights, found = decode_weights(config, variables, len(logits_BV)), [logits_BV]
    for t in range(PROMPT, T):
        cache, logits_BV = step(config, weights, batch["tokens"][:, t], cache, stage)
        found.append(logits_BV)
    return cache, jnp.stack(found, axis=1)


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_decoding_is_the_forward_pass(case):
    """Absorbed against expanded: products of float32 matrices in another order, logits of size
    1.
    """
    stage, config = CASES[case]
    expected = tiny.forward(
        config, tiny.variables(config), tiny.batch_of(LAYOUT, seed=SEED), stage
    )["logits_BTV"][:, PROMPT - 1 :]
    tiny.assert_close(decoded(case)[1], expected, atol=1e-4)


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
    assert len(jax.tree.leaves(cache)) == 3 * config.num_hidden_layers + 3
    chex.assert_trees_all_equal(cache.next_position_B, T - jnp.asarray(PADDING))
    assert int(cache.length) == T


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
    config = tiny.model_config(num_nextn_predict_layers=0)
    dense = tiny.forward(config, tiny.variables(config), tiny.batch_of(LAYOUT, seed=SEED), "dense")[
        "logits_BTV"
    ][:, PROMPT - 1 :]
    tiny.assert_close(decoded(case, topk=T)[1], dense, atol=1e-4)
    assert jnp.max(jnp.abs(decoded(case)[1] - dense)) > 0.1
