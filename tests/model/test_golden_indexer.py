"""The indexer's loss on a loaded V3.2 checkpoint, against a naive dense implementation and autodiff
through it; and the wall between it and the trunk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.transformer import Transformer
from tests.model.golden import golden, model, variables

pytestmark = pytest.mark.golden

CASE = "deepseek_v32"
CONFIG = model(CASE)


def turned(x, positions, rope, width, interleaved):
    """The first `width` channels as complex numbers times e^(i angle), one pair at a time; with
    YaRN by the formula, channel by channel.
    """
    columns = list(jnp.moveaxis(x, -1, 0))

    def channel(turns):
        return (
            width
            * np.log(rope.original_max_position_embeddings / (turns * 2 * np.pi))
            / (2 * np.log(rope.rope_theta))
        )

    low, high = (
        max(np.floor(channel(rope.beta_fast)), 0),
        min(np.ceil(channel(rope.beta_slow)), width - 1),
    )
    for pair in range(width // 2):
        plain = rope.rope_theta ** (-2 * pair / width)
        slow = min(max((pair - low) / (high - low), 0), 1)
        angle = positions * (plain * (1 - slow) + plain / rope.factor * slow)
        one, two = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
        a, b = columns[one], columns[two]
        angle = angle.reshape((1, -1) + (1,) * (x.ndim - 3))
        columns[one], columns[two] = (
            rope.attention_factor * (a * jnp.cos(angle) - b * jnp.sin(angle)),
            rope.attention_factor * (a * jnp.sin(angle) + b * jnp.cos(angle)),
        )
    return jnp.stack(columns, axis=-1)


def root_mean_square(x, scale, eps):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def naive_layer_kl(layer, indexer, x_BTD, stage):
    """Sum over queries of KL(mean over heads of the attention || softmax of the indexer's scores),
    everything dense, [B, T, T] and per head.
    """
    a, i, rope = CONFIG.mla, CONFIG.indexer, CONFIG.rope
    T = x_BTD.shape[1]
    at, causal = jnp.arange(T), jnp.tril(jnp.ones((T, T), bool))
    h = root_mean_square(x_BTD, layer["attention_norm"]["scale"], CONFIG.rms_norm_eps)
    p = layer["attention"]
    c_q = root_mean_square(h @ p["query_down"], p["query_norm"]["scale"], 1e-6)
    down = h @ p["latent_down"]
    c = root_mean_square(down[..., : a.kv_lora_rank], p["latent_norm"]["scale"], 1e-6)
    k_rope = turned(down[..., a.kv_lora_rank :], at, rope, a.qk_rope_head_dim, True)

    q_I = turned(
        jnp.einsum("btr,ric->btic", c_q, indexer["query"]), at, rope, i.rope_head_dim, False
    )
    k = h @ indexer["key"]
    k = (k - k.mean(-1, keepdims=True)) / jnp.sqrt(k.var(-1, keepdims=True) + 1e-6) * indexer[
        "key_norm"
    ]["scale"] + indexer["key_norm"]["bias"]
    k_I = turned(k, at, rope, i.rope_head_dim, False)
    w = h @ indexer["head_weight"]
    scores = (
        sum(
            w[..., n, None] * jnp.maximum(jnp.einsum("btc,bsc->bts", q_I[:, :, n], k_I), 0)
            for n in range(i.n_heads)
        )
        * (i.n_heads * i.head_dim) ** -0.5
    )

    attended = jnp.broadcast_to(causal, scores.shape)
    if stage == "sparse":
        worst = jnp.sort(jnp.where(causal, scores, -jnp.inf), axis=-1)[..., -i.topk, None]
        attended = causal & (scores >= worst)
    target = 0
    for n in range(a.num_attention_heads):
        q = c_q @ p["query_up"][:, n]
        q_rope = turned(q[..., a.qk_nope_head_dim :], at, rope, a.qk_rope_head_dim, True)
        logits = q[..., : a.qk_nope_head_dim] @ jnp.swapaxes(
            c @ p["key_up"][:, n], 1, 2
        ) + q_rope @ jnp.swapaxes(k_rope, 1, 2)
        logits *= a.qk_head_dim**-0.5 * a.logit_scale
        target += (
            jax.nn.softmax(jnp.where(attended, logits, -jnp.inf), axis=-1) / a.num_attention_heads
        )
    log_predicted = jax.nn.log_softmax(jnp.where(attended, scores, -jnp.inf), axis=-1)
    target = jax.lax.stop_gradient(target)
    return jnp.sum(
        jnp.where(
            target > 0,
            target
            * (jnp.log(jnp.where(target > 0, target, 1)) - jnp.where(attended, log_predicted, 0)),
            0,
        )
    )


def inputs():
    tokens_BT = jnp.asarray(golden(CASE)["input_ids"])
    return (
        tokens_BT,
        jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape),
        jnp.ones_like(tokens_BT),
    )


@functools.cache
def ours(stage: str):
    """(the KL of each layer of the trunk, the gradient of all layers' sum to every parameter, the
    inputs of the trunk's layers).
    """

    def kl(params):
        output, sown = Transformer(CONFIG).apply(
            variables(CASE) | {"params": params}, *inputs(), stage=stage, mutable=["record"]
        )
        return jnp.sum(output.stats.indexer.kl), (
            output.stats.indexer.kl[: CONFIG.num_hidden_layers],
            sown["record"],
        )

    (_, (kl_L, record)), gradient = jax.jit(jax.value_and_grad(kl, has_aux=True))(
        variables(CASE)["params"]
    )
    outputs = [
        record[stack]["block_0"]["hidden"][0][index]
        for stack, index in (("layers_0", 0), ("layers_1", 0))
    ]
    return (
        kl_L,
        gradient,
        [jnp.take(variables(CASE)["params"]["embedding"], inputs()[0], axis=0), *outputs],
    )


def layer_of(params, number):
    stack, index = (("layers_0", 0), ("layers_1", 0), ("layers_1", 1))[number]
    return jax.tree.map(lambda leaf: leaf[index], params[stack]["block_0"])


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_the_indexer_learns_as_autodiff_through_a_naive_implementation_says(stage):
    kl_L, gradient, layer_inputs = ours(stage)
    params = variables(CASE)["params"]
    for number, x_BTD in enumerate(layer_inputs):
        layer = layer_of(params, number)
        kl, expected = jax.value_and_grad(
            lambda indexer, layer=layer, x=x_BTD: naive_layer_kl(layer, indexer, x, stage)
        )(layer["attention"]["indexer"])
        np.testing.assert_allclose(kl_L[number], kl, rtol=1e-5)
        found = layer_of(gradient, number)["attention"]["indexer"]
        for path, leaf in jax.tree.leaves_with_path(expected):
            same = functools.reduce(lambda tree, key: tree[key.key], path, found)
            np.testing.assert_allclose(
                same,
                leaf,
                rtol=1e-3,
                atol=1e-4 * float(jnp.max(jnp.abs(leaf))),
                err_msg=f"{number} {path}",
            )  # sums over 80 queries
            np.testing.assert_allclose(np.linalg.norm(same), np.linalg.norm(leaf), rtol=1e-4)


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_its_loss_reaches_nothing_else(stage):
    """Exactly zero, to all of trunk and MTP module. (That the language model's reaches no indexer,
    exactly: test_golden_gradients.test_loss_and_gradients.)
    """
    for path, leaf in jax.tree.leaves_with_path(ours(stage)[1]):
        assert jnp.any(leaf) == any(key.key == "indexer" for key in path), path
