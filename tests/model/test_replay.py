"""A pass that does again what was recorded is that pass, and is differentiable."""

import dataclasses
import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.reference import select_topk
from model.layers.moe import MoE
from model.record import (
    recorded_forward,
    replay,
    routing_layers,
    selecting_layers,
)
from model.transformer import Output, Transformer
from tests import tiny

CONFIG = tiny.model_config(num_nextn_predict_layers=0, attention_form="chunks")
FORMS = {
    "chunks": CONFIG,
    "chunks of few queries": dataclasses.replace(CONFIG, query_chunk=5),
    "gathered": dataclasses.replace(CONFIG, attention_form="gathered"),
    "tiles": dataclasses.replace(CONFIG, attention_form="tiles"),
    "remat": dataclasses.replace(CONFIG, remat="dots"),
}


@functools.partial(jax.jit, static_argnums=0)
def record(config, variables, batch):
    inputs = batch["tokens"], batch["positions"], batch["segments"]
    output, found = recorded_forward(config, variables, *inputs, "sparse")
    routes = found.routes_BLTK[:, jnp.asarray(routing_layers(config))]
    selected = found.selected_BLTk[:, jnp.asarray(selecting_layers(config))]
    return output.hidden_BTD, routes, selected


@functools.partial(jax.jit, static_argnums=0)
def replayed(config, variables, batch, routes=None, selected=None):
    """Hidden states, and the gradient of a sum over those of real tokens."""

    def total(params):
        inputs = batch["tokens"], batch["positions"], batch["segments"]
        given = variables | {"params": params} | replay(config, routes, selected)
        applied = Transformer(config).apply(given, *inputs, stage="sparse", mtp=False)
        hidden_BTD = cast(Output, applied).hidden_BTD
        real_BT1 = (batch["segments"] > 0)[..., None]
        return jnp.sum(jnp.where(real_BT1, jnp.sin(hidden_BTD), 0.0)), hidden_BTD

    (_, hidden_BTD), grads = jax.value_and_grad(total, has_aux=True)(variables["params"])
    return jnp.where((batch["segments"] > 0)[..., None], hidden_BTD, 0.0), grads


def others(variables: dict) -> dict:
    """Variables that choose otherwise."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x * (1 + 0.3 * rng.normal(size=x.shape)).astype(x.dtype), variables
    )


@pytest.mark.heavy
@pytest.mark.parametrize("form", FORMS)
def test_a_replay_of_its_own_record_is_the_pass_itself(form):
    """Values, and gradients of size 1 to 40, whose sums over keys "gathered" has in another order;
    packed rows, padding on either side, most queries with more keys than are selected.
    """
    config, variables, batch = FORMS[form], tiny.variables(CONFIG), tiny.batch_of()
    _, routes, selected = record(config, variables, batch)
    assert (np.asarray(selected) >= 0).any() and routes.shape[1] == 2 and selected.shape[1] == 3
    expected = replayed(config, variables, batch)
    found = replayed(config, variables, batch, routes, selected)
    tiny.assert_close(found, expected, atol=2e-4, rtol=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("form", ["gathered", "tiles", "remat"])
def test_what_another_model_chose_is_the_same_in_every_form(form):
    """The record decides, not the model: with another's record the result is another."""
    variables, batch = tiny.variables(CONFIG), tiny.batch_of()
    _, routes, selected = record(CONFIG, others(variables), batch)
    expected = replayed(CONFIG, variables, batch, routes, selected)
    found = replayed(FORMS[form], variables, batch, routes, selected)
    tiny.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    own, _ = replayed(CONFIG, variables, batch)
    assert jnp.max(jnp.abs(expected[0] - own)) > 0.1


@pytest.mark.heavy
def test_tokens_without_a_record_choose_for_themselves():
    variables, batch = tiny.variables(CONFIG), tiny.batch_of()
    _, routes, selected = record(CONFIG, variables, batch)
    own, _ = replayed(CONFIG, variables, batch)
    found, _ = replayed(CONFIG, variables, batch, jnp.full_like(routes, -1), selected)
    tiny.assert_close(found, own, atol=1e-6)


@pytest.mark.heavy
def test_queries_without_a_record_attend_to_the_latest_keys():
    """Those with no more keys than are selected attend to all, as ever: nothing needs recording."""
    variables, batch = tiny.variables(CONFIG), tiny.batch_of()
    _, routes, selected = record(CONFIG, variables, batch)
    few_BT = batch["positions"] < CONFIG.indexer.topk
    forgotten = jnp.where(few_BT[:, None, :, None], -1, selected)
    for form in ("chunks", "gathered", "tiles"):
        found, _ = replayed(FORMS[form], variables, batch, routes, forgotten)
        expected, _ = replayed(FORMS[form], variables, batch)
        tiny.assert_close(found, expected, atol=2e-5)


def test_gates_of_recorded_experts_have_the_gradient_of_a_loop():
    """Central differences of a float64 loop over the router's weights: gates are normalised scores
    of the recorded experts, whichever are the best now.
    """
    config = dataclasses.replace(CONFIG, expert_matmul="reference")
    moe, rng = MoE(config), np.random.default_rng(0)
    x_BTD = jnp.asarray(rng.normal(size=(1, 6, config.hidden_size)), jnp.float32)
    real_BT = jnp.ones((1, 6), bool)
    variables = nn.meta.unbox(moe.init(jax.random.key(0), x_BTD, real_BT))
    routes_BTK = jnp.asarray(rng.permuted(np.tile(np.arange(4), (6, 1)), axis=1)[None, :, :2])
    target_TD = rng.normal(size=(6, config.hidden_size))

    def total(router):
        params = variables["params"] | {"router": router}
        given = variables | {"params": params, "replay": {"routes": routes_BTK}}
        out_BTD, _ = moe.apply(given, x_BTD, real_BT)
        return jnp.sum(out_BTD[0] * target_TD)

    found = np.asarray(jax.grad(total)(variables["params"]["router"]))
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    x_TD = np.asarray(x_BTD[0], np.float64)

    def by_loop(router_DE):
        scores_TE, total = 1 / (1 + np.exp(-x_TD @ router_DE)), 0.0
        for t, experts in enumerate(np.asarray(routes_BTK[0])):
            for expert in experts:
                gate = scores_TE[t, expert] / scores_TE[t, experts].sum()
                gate_F, up_F = x_TD[t] @ p["gate"][expert], x_TD[t] @ p["up"][expert]
                out_D = (gate_F / (1 + np.exp(-gate_F)) * up_F) @ p["down"][expert]
                total += gate * config.moe.routed_scaling_factor * out_D @ target_TD[t]
        return total

    step, router = 1e-5, p["router"]
    for d, e in ((0, 0), (3, 1), (7, 2), (11, 3)):
        move = np.zeros_like(router)
        move[d, e] = step
        slope = (by_loop(router + move) - by_loop(router - move)) / (2 * step)
        np.testing.assert_allclose(found[d, e], slope, rtol=1e-3, atol=1e-4)


def test_ties_are_decided_by_position_everywhere():
    """More zeros than places: the earliest win, in the full pass, in a cached step, by every form
    and a hundred times.
    """
    rng = np.random.default_rng(0)
    scores_BTS = np.maximum(rng.normal(size=(2, 24, 24)), 0).astype(np.float32)
    scores_BTS[rng.random(scores_BTS.shape) < 0.6] = 0
    allowed_BTS = np.broadcast_to(np.tri(24, dtype=bool), scores_BTS.shape)
    expected = np.zeros_like(allowed_BTS)
    for b, t in np.ndindex(2, 24):
        order = sorted(range(t + 1), key=lambda s, b=b, t=t: (-scores_BTS[b, t, s], s))
        expected[b, t, order[:4]] = True
    select = jax.jit(functools.partial(select_topk, topk=4))
    for _ in range(100):
        np.testing.assert_array_equal(select(scores_BTS, allowed_BTS), expected)
    masked = np.where(allowed_BTS, scores_BTS, -np.inf)
    index = np.sort(jax.lax.top_k(masked, 4)[1], axis=-1)  # as "gathered" and a cached step select
    for b, t in np.ndindex(2, 24):
        if t >= 3:
            np.testing.assert_array_equal(index[b, t], np.flatnonzero(expected[b, t]))
