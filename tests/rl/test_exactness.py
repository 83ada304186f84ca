"""What sampler and trainer agree on is measured: choices, log-probs, the old policy, a canary."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.tokenizer_training import bytes_tokenizer
from errors import UserError
from model.heads import logits_of
from model.mesh import MeshConfig
from model.record import CHOICES, routing_layers, selecting_layers
from model.sharding import make_mesh
from rl.agreement import Agreement, jaccard
from rl.algorithms.spec import get_algorithm
from rl.canary import TOKENS, TOLERANCE, Canary
from rl.compared import compared_logprobs, left_policy
from rl.config import SamplingConfig
from rl.draw import draw
from rl.engine import Engine
from rl.generate import Generator
from rl.objective import policy_objective
from rl.trajectory import batch_of
from tests import tiny
from tests.compilations import ENGINE, compilations_of
from tests.rl.test_engine import MESH
from tests.rl.test_recorded import CONFIG, NEW, WIDTH, conversations
from train.scoring import forward_logprobs
from train.setup import Setup
from train.state import first_state
from train.step import make_step

SETUP = Setup(CONFIG, bytes_tokenizer(), MESH)


def sets_of(rng, k: int, most: int) -> np.ndarray:
    """20 lists of up to k numbers below `most`, in any order, then -1."""
    sets_Bk = np.full((20, k), -1)
    for row in sets_Bk:
        count = rng.integers(0, k + 1)
        row[:count] = rng.choice(most, count, replace=False)
    return sets_Bk


def test_the_jaccard_index_is_that_of_sets():
    rng = np.random.default_rng(0)
    one, other = sets_of(rng, 6, 9), sets_of(rng, 4, 9)
    one[0], other[0] = -1, -1
    found = jaccard(jnp.asarray(one), jnp.asarray(other))
    for row, index in enumerate(np.asarray(found)):
        a, b = ({*each[row]} - {-1} for each in (one, other))
        expected = len(a & b) / len(a | b) if a | b else 1.0
        assert index == pytest.approx(expected)
    assert found[0] == 1 and jnp.min(found) < 0.2


@functools.cache
def recorded_rows() -> dict[str, np.ndarray]:
    return batch_of(list(conversations().values()), WIDTH + NEW, pad=0)


@functools.cache
def agreement() -> Agreement:
    return Agreement(SETUP, "sparse", rows=100)


@pytest.mark.heavy
def test_choices_are_alike_with_the_weights_that_sampled_and_not_with_others():
    """By layer. What has been made to differ in one layer's record is seen in that layer alone, to
    the number; a query without a choice does not count.
    """
    batch, layers = dict(recorded_rows()), selecting_layers(CONFIG)
    same = agreement().metrics(agreement()(tiny.variables(CONFIG), batch))
    names = [f"selected_jaccard_{layer}" for layer in layers]
    names += [f"routes_jaccard_{layer}" for layer in routing_layers(CONFIG)]
    assert same == {
        f"sampling/{name}": 1.0 for name in (*names, "selected_jaccard", "routes_jaccard")
    }
    off = jax.tree.map(lambda x: x * 1.5, tiny.variables(CONFIG))
    others = agreement().metrics(agreement()(off, batch))
    assert all(0 < value < 1 for name, value in others.items() if "jaccard_" in name)

    topk = CONFIG.indexer.topk
    selected_BLTk = batch["selected"].copy()
    choice_BT = (batch["positions"] >= topk) & (selected_BLTk[:, 1, :, 0] >= 0)
    # The first key of one row's queries in the second layer is forgotten: topk - 1 of topk.
    row = 0
    selected_BLTk[row, 1, :, :-1] = selected_BLTk[row, 1, :, 1:]
    selected_BLTk[row, 1, :, -1] = -1
    changed = batch | {"selected": selected_BLTk}
    found = agreement().metrics(agreement()(tiny.variables(CONFIG), changed))
    share = choice_BT[row].sum() / choice_BT.sum()
    expected = 1 - share / topk
    assert found[f"sampling/selected_jaccard_{layers[1]}"] == pytest.approx(expected, abs=1e-6)
    for layer in (layers[0], layers[2]):
        assert found[f"sampling/selected_jaccard_{layer}"] == 1


@pytest.mark.mesh
def test_rows_over_eight_devices_are_compared_alike():
    """A row a device; one of them, and one of its experts in one layer, has another record."""
    rows = np.arange(8) % len(recorded_rows()["tokens"])
    batch = {name: x[rows] for name, x in recorded_rows().items()}
    routes_BLTK = batch["routes"].copy()
    read_T = routes_BLTK[7, 0, :, 0] >= 0
    routes_BLTK[7, 0, read_T, 1] = CONFIG.moe.num_experts  # that no token goes to
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2, tensor=1))
    compare = Agreement(Setup(CONFIG, bytes_tokenizer(), mesh), "sparse", rows=3)
    with jax.set_mesh(mesh):
        found = compare(tiny.variables(CONFIG), batch | {"routes": routes_BLTK})
        metrics = compare.metrics(found)
    changed, kept = (f"sampling/routes_jaccard_{layer}" for layer in routing_layers(CONFIG))
    # One expert of two in common, of three in all.
    share = read_T.sum() / (routes_BLTK[:, 0, :, 0] >= 0).sum()
    assert metrics[changed] == pytest.approx(1 - share * 2 / 3, abs=1e-6)
    assert metrics[kept] == metrics["sampling/selected_jaccard"] == 1


@pytest.mark.heavy
def test_what_has_no_choice_is_left_out():
    """Queries none of which has more keys than are selected; no record; and no rows to look at."""
    batch = recorded_rows()
    early = {"positions": np.minimum(batch["positions"], CONFIG.indexer.topk - 1)}
    found = agreement().metrics(agreement()(tiny.variables(CONFIG), batch | early))
    assert "sampling/routes_jaccard_1" in found
    assert not any("selected" in name for name in found)
    unrecorded = {name: x for name, x in batch.items() if name not in ("routes", "selected")}
    assert agreement()(tiny.variables(CONFIG), unrecorded) == {}
    assert Agreement(SETUP, "sparse", rows=0)(tiny.variables(CONFIG), batch) == {}


def updates_of(dtype: str, microbatches: int):
    """The metrics of two updates of one batch, its old log-probs the trainer's own."""
    config = dataclasses.replace(
        CONFIG, dtype=dtype, num_hidden_layers=1, first_k_dense_replace=0, canon_kernel_size=0
    )
    train = tiny.train_config(mtp_weight=0.0, microbatches=microbatches)
    algorithm = get_algorithm("grpo", max_completion=NEW, kl_weight=0.0)
    optimizer = optax.sgd(0.1)
    objective = policy_objective(config, train, algorithm, 1.0)
    step = jax.jit(make_step(config, train, objective, optimizer))
    batch = tiny.batch_of()
    mask_BT = (batch["segments"] > 0) & (batch["positions"] > 2)
    advantages_BT = jnp.where(mask_BT, jnp.asarray([1.0, -1, 2, -2])[:, None], 0.0)
    sampled = {"sampler_logprobs": jnp.where(mask_BT, -4.0, 0.0), "advantages": advantages_BT}
    batch |= {"mask": mask_BT} | sampled

    def score(variables, batch):  # what another program makes of them may be a little off
        return batch["sampler_logprobs"]

    state = first_state(tiny.variables(config), optimizer)
    batch |= compared_logprobs(score, state.variables, None, batch, "trainer", updates=2)
    state, first = step(state, batch)
    _, second = step(state, left_policy(batch))
    return first, second


@pytest.mark.heavy
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_ratio_is_one_to_the_bit(dtype, microbatches):
    """Whatever another program made of the old log-probs, which the next update compares with."""
    first, second = updates_of(dtype, microbatches)
    assert first["ratio/mean"] == 1.0 and first["ppo_kl"] == 0.0
    assert first["clip_ratio/region_mean"] == 0.0
    assert first["grad_norm"] > 0, "a ratio of 1 has a gradient"
    assert second["ratio/mean"] != 1.0 and second["ppo_kl"] > 0


def test_log_probs_and_the_head_are_float32_whatever_the_model_computes_in():
    """Logits of a bfloat16 model are sums in float32: no bfloat16 number has them."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    rng = np.random.default_rng(0)
    hidden_BD = jnp.asarray(rng.normal(size=(4, config.hidden_size)), jnp.bfloat16)
    params = tiny.variables(config)["params"]
    logits_BV = logits_of(config, params, hidden_BD)
    head_DV = np.asarray(params["head"].astype(jnp.bfloat16), np.float64)
    assert logits_BV.dtype == jnp.float32
    # The products of bfloat16 numbers are exact in float32; sums of 32 of them round to 1e-6.
    np.testing.assert_allclose(logits_BV, np.asarray(hidden_BD, np.float64) @ head_DV, atol=1e-5)
    assert jnp.mean(logits_BV == logits_BV.astype(jnp.bfloat16)) < 0.1
    keys_B = jax.random.split(jax.random.key(0), 4)
    assert draw(SamplingConfig(), logits_BV, keys_B).logprob_B.dtype == jnp.float32
    batch = tiny.batch_of()
    scored = jax.eval_shape(
        functools.partial(forward_logprobs, config, "sparse", 1.0), tiny.variables(config), batch
    )
    assert scored[0].dtype == scored[1].dtype == jnp.float32


def canary(own: Engine) -> Canary:
    sampling = SamplingConfig(max_prompt_tokens=WIDTH, max_new_tokens=NEW, attention="sparse")
    prompt = np.random.default_rng(0).integers(20, tiny.VOCAB, 30).tolist()
    return Canary(SETUP, own, prompt, stage="sparse", sampling=sampling)


@pytest.mark.heavy
def test_a_canary_stops_a_sampler_with_other_weights(monkeypatch):
    """Those of an update before: one matrix, a hundredth off. Nothing is compiled again."""
    own = Engine(
        CONFIG,
        MESH,
        SamplingConfig(max_prompt_tokens=WIDTH, max_new_tokens=NEW, attention="sparse"),
        rows=4,
        steps=3,
        record=CHOICES,
    )
    variables, bird = tiny.variables(CONFIG), canary(own)
    assert 0 <= bird.check(1, variables) < 1e-5
    moved = variables | {
        "params": variables["params"] | {"head": variables["params"]["head"] * 1.01}
    }
    load = own.load
    with compilations_of(*ENGINE) as compiled:
        assert bird.check(2, moved) < 1e-5, "both have the new weights"
        monkeypatch.setattr(own, "load", lambda _, version=0: load(variables, version))
        with pytest.raises(UserError, match="step 3: sampler and trainer do not have the same"):
            bird.check(3, moved)
    assert not compiled and own.counts.sampled == 3 * TOKENS


@pytest.mark.heavy
def test_a_sampler_in_bfloat16_has_the_tolerance_of_bfloat16():
    """The trainer stays in float32; the gap between them is that of rounding, and it is there."""
    sampling = SamplingConfig(
        max_prompt_tokens=WIDTH, max_new_tokens=NEW, attention="sparse", dtype="bfloat16"
    )
    config = dataclasses.replace(CONFIG, vocab_size=SETUP.tokenizer.vocab_size)
    setup = dataclasses.replace(SETUP, model=config)
    generate = Generator(setup, sampling, "think", completions=4, group_size=1, record=CHOICES)
    prompt = np.random.default_rng(0).integers(20, tiny.VOCAB, 30).tolist()
    bird = Canary(setup, generate.engine, prompt, stage="sparse", sampling=sampling)
    assert 1e-5 < bird.check(1, tiny.variables(config)) < TOLERANCE["bfloat16"]
