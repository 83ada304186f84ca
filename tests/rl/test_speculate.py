"""Drafts change how fast a completion is sampled, and nothing else."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from errors import UserError
from model.heads import logits_of
from rl.config import SamplingConfig
from rl.draw import without_rejected
from rl.engine import Engine
from rl.halting import StopSequences
from rl.records import RECORDS
from rl.request import Prompt, keys_of
from rl.trajectory import Trajectory
from tests import tiny
from tests.rl.test_engine import MESH, NEW, WIDTH, assert_same, by_number, prompts_of
from tests.rl.test_turns import conversation

D, ROWS = 2, 6
MODELS = {
    "mla": tiny.model_config(num_nextn_predict_layers=D, initializer_range=0.1),
    "rewound": tiny.model_config(
        num_nextn_predict_layers=D, initializer_range=0.1, canon_kernel_size=0
    ),
    "hybrid": dataclasses.replace(
        tiny.HYBRID, num_nextn_predict_layers=D, initializer_range=0.1, canon_kernel_size=3
    ),
    # One layer, with experts: for tens of thousands of tokens.
    "shallow": tiny.model_config(
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_nextn_predict_layers=D,
        initializer_range=0.1,
        canon_kernel_size=0,
    ),
}
SETTINGS = {
    "sparse": ("mla", SamplingConfig(temperature=0.7, top_k=30, top_p=0.95)),
    "rewound": ("rewound", SamplingConfig()),
    "greedy": ("rewound", SamplingConfig(temperature=0.0)),
    "hybrid": ("hybrid", SamplingConfig(attention="dense")),
    "rejection": ("rewound", SamplingConfig(draft_acceptance="rejection")),
}


@functools.cache
def variables_of(model: str) -> dict:
    """Weights with which the modules agree with the trunk now and then: what a token looks like is
    the better part of what both make of it.
    """
    variables = tiny.variables(MODELS[model])
    params = variables["params"] | {"embedding": 10 * variables["params"]["embedding"]}
    for name in (f"mtp_{k}" for k in range(D)):
        own = params[name]["merge"][1]
        params[name] = params[name] | {"merge": jnp.stack([jnp.eye(len(own)), own])}
    return variables | {"params": params}


def engine(name: str, drafts: int = D, steps: int = 7) -> Engine:
    return _engine(name, drafts, steps)


@functools.cache
def _engine(name: str, drafts: int, steps: int) -> Engine:
    """Slots for tests; only those of `sparse` record."""
    model, sampling = SETTINGS[name]
    sampling = dataclasses.replace(
        sampling, max_prompt_tokens=WIDTH, max_new_tokens=4 * NEW, drafts=drafts
    )
    made = Engine(
        MODELS[model],
        MESH,
        sampling,
        rows=ROWS,
        group_size=2,
        steps=steps,
        record=RECORDS if name == "sparse" else (),
    )
    made.load(variables_of(model))
    return made


def prompts(**changes) -> list[Prompt]:
    return prompts_of(**{"max_new_tokens": 2 * NEW} | changes)


@functools.cache
def sampled(name: str, drafts: int = D) -> dict[tuple[int, int], Trajectory]:
    return by_number(engine(name, drafts).run(prompts()))


def assert_alike(found: dict, expected: dict) -> None:
    """The same tokens and records; log-probs of another program, float32 of size 1 to 5."""
    assert found.keys() == expected.keys()
    for number, each in expected.items():
        logprobs = {name: getattr(found[number], name) for name in ("logprobs_T", "log_kept_T")}
        for name, value in logprobs.items():
            np.testing.assert_allclose(value, getattr(each, name), atol=2e-5)
        assert_same(found[number], dataclasses.replace(each, **logprobs))


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["sparse", "greedy", "hybrid"])
def test_what_is_sampled_is_the_same_with_and_without_drafts(name):
    """Token for token, with experts and selected keys where they are recorded; some drafts are
    taken, and some are not.
    """
    assert_alike(sampled(name), sampled(name, drafts=0))
    counts = engine(name).counts
    assert counts.drafted == D * counts.passes
    assert counts.sampled == counts.passes + counts.accepted
    assert 0.02 < counts.accepted / counts.drafted < 0.98


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["rewound", "hybrid"])
def test_a_conversation_is_the_same_with_and_without_drafts(name):
    """Text halts take back tokens that were sampled beyond, drafts among them, and turns follow."""
    halts = StopSequences(tuple((n,) for n in range(30, 40)))
    options = {"reply": conversation(3, turns=2), "halts": halts}
    expected = by_number(engine(name, drafts=0).run(prompts(**options)))
    assert_alike(by_number(engine(name).run(prompts(**options))), expected)
    assert any(np.sum(each.roles_T == 3) == 6 for each in expected.values())


@pytest.mark.heavy
def test_a_grammar_is_asked_before_every_token():
    """A row with one takes no drafts, and every token is as allowed."""

    def allowed(sampled):
        mask_V = np.zeros(tiny.VOCAB, bool)
        mask_V[20 + len(sampled) % 3 :: 3] = True
        return mask_V

    for name in ("rewound", "rejection"):
        for each in engine(name).run(prompts(allowed=allowed, stops=())):
            np.testing.assert_array_equal((each.completion - 20) % 3, np.arange(2 * NEW) % 3)


@pytest.mark.heavy
def test_a_completion_depends_on_its_key_alone():
    """Other company, some of which is looked at after every token and takes no drafts; another
    order, other numbers of passes between two looks. To the bit.
    """
    expected = sampled("rejection")
    others = prompts_of((5, 30, 1), seed=1, numbers=range(100, 103), max_new_tokens=3)
    others[1] = dataclasses.replace(others[1], allowed=lambda _: np.arange(tiny.VOCAB) > 30)
    found = by_number(engine("rejection", steps=32).run([*others, *prompts()[::-1]]))
    for number, each in expected.items():
        assert_same(found[number], each)


@pytest.mark.heavy
def test_the_distribution_is_the_models():
    """50,000 tokens of completions of three, their probabilities by the forward pass: chi-square
    over all that may follow one prompt with temperature, top-k and top-p on. A wrong sampler (the
    modules' own tokens) fails it beyond any doubt. By rejection: coupled drafts are the samples
    without drafts, token for token.
    """
    name, count, length = "shallow", 16_667, 3
    sampling = SamplingConfig(
        temperature=0.8,
        top_k=8,
        top_p=0.9,
        max_prompt_tokens=4,
        max_new_tokens=length,
        drafts=D,
        draft_acceptance="rejection",
    )
    prompt = [20, 30, 40, 50]
    own = Engine(MODELS[name], MESH, sampling, rows=512, group_size=count)
    own.load(variables_of(name))
    found = list(own.run([Prompt(prompt, keys_of(7, [0], count)[0], length)]))
    observed = np.zeros((tiny.VOCAB,) * length, int)
    for each in found:
        observed[tuple(each.completion)] += 1
    probability = exact_probabilities(name, sampling, prompt, length)
    drafts_alone = exact_probabilities(name, sampling, prompt, length, modules=True)
    assert 0.1 < own.counts.accepted / own.counts.drafted < 0.95
    assert np.all(observed[probability == 0] == 0)
    assert p_value(observed, probability) > 1e-3
    assert p_value(observed, drafts_alone) < 1e-12


def p_value(observed, probability) -> float:
    """Of Pearson's chi-square; outcomes expected fewer than 5 times count as one."""
    expected, observed = probability.ravel() * observed.sum(), observed.ravel()
    often = expected >= 5
    expected = np.append(expected[often], expected[~often].sum())
    observed = np.append(observed[often], observed[~often].sum())
    expected = np.maximum(expected, 1e-9)
    statistic = np.sum((observed - expected) ** 2 / expected)
    return float(stats.chi2.sf(statistic, len(expected) - 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def following(model, sampling, variables, tokens_BT, last):
    """Probabilities [B, D + 1, V] that are drawn from, of the token after the one at `last`: by the
    trunk, and by each module, which stands as many tokens before.
    """
    batch = {
        "tokens": tokens_BT,
        "positions": jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape),
        "segments": jnp.ones_like(tokens_BT),
    }
    output = tiny.output_of(model, variables, batch, "sparse")
    hidden = (output.hidden_BTD, *output.mtp_hidden)
    at_BKD = jnp.stack([hidden_BTD[:, last - k] for k, hidden_BTD in enumerate(hidden)], axis=1)
    logits_BKV = logits_of(model, variables["params"], at_BKD)
    return jax.vmap(jax.vmap(functools.partial(kept, sampling)))(logits_BKV)


def exact_probabilities(name, sampling, prompt, length, modules=False):
    """Of every continuation of three tokens: by the trunk, or the last two by the MTP modules."""
    model, variables, V = MODELS[name], variables_of(name), tiny.VOCAB
    probability, tokens = np.ones(1), np.asarray([prompt])
    for ahead in range(length):
        # In one shape; what stands behind a token has no say in what follows it.
        padded_BT = np.zeros((sampling.top_k ** (length - 1), len(prompt) + length), np.int32)
        padded_BT[: len(tokens), : tokens.shape[1]] = tokens
        found_BKV = following(model, sampling, variables, padded_BT, tokens.shape[1] - 1)
        following_BV = np.asarray(found_BKV)[: len(tokens), ahead if modules else 0]
        probability = (probability[:, None] * following_BV).reshape(-1)
        tokens = np.concatenate(
            [np.repeat(tokens, V, 0), np.tile(np.arange(V), len(tokens))[:, None]], axis=1
        )
        probability, tokens = probability[probability > 0], tokens[probability > 0]
    full = np.zeros((V,) * length)
    full[tuple(tokens[:, len(prompt) :].T)] = probability
    return full


def kept(sampling, logits_V):
    """Softmax at the temperature, then top-k, then top-p, each renormalised: by its definition."""
    order = jnp.argsort(-logits_V)
    p = jax.nn.softmax(logits_V[order] / sampling.temperature)
    p = jnp.where(jnp.arange(len(p)) < sampling.top_k, p, 0)
    p /= p.sum()
    p = jnp.where(jnp.cumsum(p) - p < sampling.top_p, p, 0)
    return jnp.zeros_like(p).at[order].set(p / p.sum())


def test_what_is_left_after_a_rejection_makes_the_distribution_whole():
    """q min(1, p / q) + P(rejected) residual = p, of random p and q, and where they are equal."""
    rng = np.random.default_rng(0)
    p_BV, q_BV = rng.dirichlet(np.full(9, 0.5), (2, 6))
    q_BV[0] = p_BV[0]
    log_p_BV, log_q_BV = jnp.log(p_BV), jnp.log(q_BV)
    left_BV = jax.nn.softmax(without_rejected(log_p_BV, log_q_BV), axis=-1)
    taken_BV = np.minimum(p_BV, q_BV)
    made_BV = taken_BV + (1 - taken_BV.sum(-1, keepdims=True)) * left_BV
    np.testing.assert_allclose(made_BV, p_BV, atol=1e-6)
    none_BV = jnp.full_like(log_p_BV, -jnp.inf)
    chex.assert_trees_all_close(jnp.exp(without_rejected(log_p_BV, none_BV)), p_BV, atol=1e-6)


def test_more_drafts_than_modules_are_one_line():
    sampling = SamplingConfig(drafts=3)
    with pytest.raises(UserError, match=r"sampling\.drafts = 3: the model has 2 MTP modules"):
        Engine(MODELS["mla"], MESH, sampling, rows=2)
