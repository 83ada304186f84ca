"""Public models' numbers (tests/golden, made by transformers): what this codebase computes forward.

Logits, hidden states, routes, selected keys and greedy tokens are what was recorded. Gradients and
loading are in test_golden_gradients.py, the tolerances' reasons in golden.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.decode import prefill
from model.decode_weights import decode_weights
from model.heads import logits_of
from tests import tiny
from tests.model.golden import (
    CASES,
    SHORT,
    WITH_INDEXER,
    WITH_MTP,
    forward,
    found,
    golden,
    model,
    of_prompts,
    stage,
    variables,
)

pytestmark = pytest.mark.golden


def of_layers(case: str, x_BLT):
    """What the record has of the recorded prompts: arrays [rows, layers, T, ...]."""
    return x_BLT[:2, :, : golden(case)["input_ids"].shape[1]]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_hidden_states(case):
    logits_BTV, _, record = found(case)
    np.testing.assert_allclose(of_prompts(case, logits_BTV), golden(case)["logits"], atol=3e-4)
    np.testing.assert_allclose(
        of_layers(case, record.hidden_BLTD), golden(case)["hidden"], atol=3e-4
    )


@pytest.mark.parametrize("case", [case for case in CASES if case != "qwen3"])
def test_routes(case):
    """As sets: what order they come in is not part of the model."""
    routes_BLTK = of_layers(case, found(case)[2].routes_BLTK)
    np.testing.assert_array_equal(jnp.sort(routes_BLTK, axis=-1), golden(case)["routes"])


@pytest.mark.parametrize("case", WITH_INDEXER)
def test_selected_keys(case):
    selected_BLTk = of_layers(case, found(case)[2].selected_BLTk)
    np.testing.assert_array_equal(selected_BLTk, golden(case)["indexer"])


@pytest.mark.parametrize("case", WITH_MTP)
def test_mtp_logits(case):
    """The last position of a prompt has no next token to read, as it was recorded."""
    mtp_BTV = of_prompts(case, found(case)[1][0])[:, :-1]
    np.testing.assert_allclose(mtp_BTV, golden(case)["mtp_logits"], atol=3e-4)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(case):
    """Cached, absorbed, recurrent: token by token, from a prompt that is padded on the right."""
    config, expected = model(case), golden(case)["greedy"]
    prompt_BT = np.pad(golden(case)["input_ids"], ((0, 0), (0, 3)))
    slots = prompt_BT.shape[1] + expected.shape[1]
    read = jax.jit(prefill, static_argnums=(0, 4, 5))
    count_B = jnp.full(len(prompt_BT), prompt_BT.shape[1] - 3)
    cache, hidden_BD, _ = read(
        config, variables(case), jnp.asarray(prompt_BT), count_B, slots, stage(case)
    )
    weights = decode_weights(config, variables(case), len(hidden_BD))
    step = jax.jit(tiny.decode_step, static_argnums=(0, 4))
    logits = [logits_of(config, variables(case)["params"], hidden_BD)]
    while len(logits) < expected.shape[1]:
        tokens_B = jnp.argmax(logits[-1], axis=-1)
        cache, logits_BV = step(config, weights, tokens_B, cache, stage(case))
        logits.append(logits_BV)
    decoded_BTV = jnp.stack(logits, axis=1)
    np.testing.assert_array_equal(jnp.argmax(decoded_BTV, axis=-1), expected)
    # And the logits themselves are those of one pass over prompt and answer.
    whole_BTV = found(case)[0][:2, -expected.shape[1] :]
    np.testing.assert_allclose(decoded_BTV, whole_BTV, atol=3e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_short_row_alone_and_padded(case):
    """The first tokens of a row, in a batch with a longer row and padding on either side: what
    transformers makes of them alone.
    """
    logits_BTV = found(case)[0][2:]
    for last_V in (logits_BTV[0, -1], logits_BTV[1, SHORT - 1], logits_BTV[2, SHORT - 1]):
        np.testing.assert_allclose(last_V, golden(case)["padded_logits"], atol=3e-4)


@pytest.mark.parametrize("case", WITH_INDEXER)
def test_topk_of_everything_is_dense(case):
    """And it is not what was recorded: the selection bites."""
    config = dataclasses.replace(
        model(case), indexer=dataclasses.replace(model(case).indexer, topk=1_000)
    )
    tokens_BT = jnp.asarray(golden(case)["input_ids"])
    everything, dense = (
        forward(config, name, variables(case), tokens_BT, jnp.ones_like(tokens_BT))[0]
        for name in ("sparse", "dense")
    )
    np.testing.assert_allclose(everything, dense, atol=1e-5)
    assert np.abs(everything - golden(case)["logits"]).max() > 1
