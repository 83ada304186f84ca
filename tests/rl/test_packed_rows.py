"""Several trajectories in a row: what is learnt is what each would have taught alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from model.record import recorded_forward, routing_layers, selecting_layers
from rl.algorithms.aggregations import constant, sequence_mean, token_mean
from rl.algorithms.spec import get_algorithm
from rl.coding import CodedSets
from rl.objective import policy_objective, sequences_of
from rl.packing import packed_rows
from rl.trajectory import Role, Trajectory, batch_of
from tests import tiny
from tests.trajectories import trajectory
from train.scoring import logprobs_at_tokens
from train.state import TrainState
from train.step import loss_and_gradient

WIDTH = tiny.T
# Tokens of a prompt, and of what follows it. Two of the rows that they are packed into are full.
LENGTHS = ((4, 20), (3, 12), (5, 10), (2, 9), (1, 8), (3, 6), (2, 4), (1, 1))
CONFIG = tiny.model_config(num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0)
# The balance loss takes a row for a sequence, so packing is refused with it.
TRAIN = tiny.train_config(mtp_weight=0.0, balance_weight=0.0)


def test_rows_by_hand():
    """The longest first, each where there is most room."""
    assert packed_rows([2, 7, 3, 5], width=10, multiple=1) == [[0, 1], [2, 3]]
    assert packed_rows([2, 7, 3, 5], width=17, multiple=1) == [[0, 1, 2, 3]]
    assert packed_rows([2, 7, 3, 5], width=17, multiple=2) == [[0, 1], [2, 3]]
    assert packed_rows([2, 7, 3, 5], width=8, multiple=1) == [[1], [3], [2], [0]]


def test_every_trajectory_has_a_place_and_every_row_a_trajectory():
    rng = np.random.default_rng(0)
    for _ in range(200):
        multiple, halvings = int(rng.integers(1, 4)), int(rng.integers(0, 5))
        count = multiple * 2**halvings
        lengths = rng.integers(1, 33, count).tolist()
        layout = packed_rows(lengths, 32, multiple)
        assert sorted(place for row in layout for place in row) == list(range(count))
        assert all(row and sum(lengths[place] for place in row) <= 32 for row in layout)
        assert len(layout) in [count // 2**n for n in range(halvings + 1)]
    assert len(packed_rows([8] * 16, 32, 2)) == 4


def test_a_trajectory_longer_than_a_row_is_named():
    with pytest.raises(UserError, match="a trajectory has 9 tokens, more than the 8 of a row"):
        packed_rows([3, 9], 8, 1)


def coded(selected_TLk: np.ndarray) -> CodedSets:
    """Keys of a sequence from its first token on."""
    bounds_T = 1 + np.arange(len(selected_TLk))
    return CodedSets.of_lists(selected_TLk, bounds_T, selected_TLk.shape[-1])


def test_a_packed_row_by_hand():
    """Keys stand where they stand in the row; what is not recorded stays so."""
    first = trajectory([4, 5], [8, 9], group=3)
    second = trajectory([6], [7], group=2)
    recorded = [
        dataclasses.replace(
            each,
            routes_TLK=np.arange(2 * length, dtype=np.uint8).reshape(length, 1, 2),
            selected_TL=coded(np.asarray([[[0, -1]], [[0, 1]]] * (length // 2))),
        )
        for each, length in ((first, 4), (second, 2))
    ]
    batch = batch_of(recorded, width=7, pad=1, layout=[[0, 1]])
    expected = {
        "tokens": [4, 5, 8, 9, 6, 7, 1],
        "positions": [0, 1, 2, 3, 0, 1, 0],
        "segments": [1, 1, 1, 1, 2, 2, 0],
        "mask": [0, 0, 1, 1, 0, 1, 0],
        "trajectory": [0, 0, 0, 0, 1, 1, -1],
        "group": [3, 3, 3, 3, 2, 2, -1],
        "sampler_logprobs": [0, 0, -1, -1, 0, -1, 0],
        "log_kept": [0] * 7,
        "versions": [-1, -1, 0, 0, -1, 0, -1],
        "routes": [[[0, 1], [2, 3], [4, 5], [6, 7], [0, 1], [2, 3], [-1, -1]]],
        "selected": [[[0, -1], [0, 1], [0, -1], [0, 1], [4, -1], [4, 5], [-1, -1]]],
    }
    assert batch.keys() == expected.keys()
    for name, row in expected.items():
        np.testing.assert_array_equal(batch[name], [row], err_msg=name)


def test_what_nothing_predicts_is_not_learnt():
    """A sampled token without any before it: in a packed row there is one, of another."""
    orphan = trajectory([], [7, 8])
    batch = batch_of([trajectory([4], [5]), orphan], width=4, pad=1, layout=[[0, 1]])
    np.testing.assert_array_equal(batch["mask"], [[False, True, False, True]])


def test_as_many_programs_as_numbers_of_rows():
    """Whatever the lengths: 2, 4, 8 or 16 rows."""
    rng, traced = np.random.default_rng(0), []

    @jax.jit
    def program(batch):
        traced.append(batch["tokens"].shape)
        return sequence_mean().weight(sequences_of(batch))

    for longest in range(1, 31):
        lengths = rng.integers(1, longest + 1, 16)
        trajectories = [trajectory([3], [5] * length) for length in lengths]
        layout = packed_rows([1 + int(length) for length in lengths], 31, multiple=2)
        assert float(program(batch_of(trajectories, 31, 0, layout))) == 16
    assert sorted(traced) == [(rows, 31) for rows in (2, 4, 8, 16)]


@pytest.mark.parametrize("aggregation", [sequence_mean(), token_mean(), constant(divisor=20)])
def test_an_aggregation_counts_sequences_and_not_rows(aggregation):
    rng = np.random.default_rng(0)
    layout = packed_rows(list(map(sum, LENGTHS)), WIDTH, 2)
    values = rng.normal(size=(len(LENGTHS), WIDTH)).astype(np.float32)

    def mean(layout):
        batch = batch_of(drawn(), WIDTH, 0, layout)
        sequences = sequences_of(jax.tree.map(jnp.asarray, batch))
        at_BT = np.roll(of_trajectories(batch, values), -1, axis=1)
        return aggregation.total(at_BT, sequences), aggregation.weight(sequences)

    assert len(layout) == 4
    tiny.assert_close(mean(layout), mean(None), rtol=2e-6)


def of_trajectories(batch, values_NT: np.ndarray) -> np.ndarray:
    """Returns [B, T] values of the tokens of N trajectories, wherever they stand."""
    return np.where(batch["mask"], values_NT[batch["trajectory"], batch["positions"]], 0)


@functools.cache
def drawn() -> list[Trajectory]:
    """Trajectories with random ids; of the second a part in the midst was read, not sampled."""
    rng = np.random.default_rng(0)
    found = [
        trajectory(
            *(rng.integers(0, tiny.VOCAB, count).tolist() for count in counts), group=number // 2
        )
        for number, counts in enumerate(LENGTHS)
    ]
    roles_T = found[1].roles_T.copy()
    roles_T[5:8] = Role.TOOL
    found[1] = dataclasses.replace(found[1], roles_T=roles_T)
    return found


@functools.cache
def recorded() -> list[Trajectory]:
    """The same, with what the layers of a model of other weights chose, each for itself."""
    batch = jax.tree.map(jnp.asarray, batch_of(drawn(), WIDTH, 0))
    inputs = batch["tokens"], batch["positions"], batch["segments"]
    others = jax.tree.map(lambda x: x * 1.1, tiny.variables(CONFIG))
    _, found = jax.jit(recorded_forward, static_argnums=(0, 5))(CONFIG, others, *inputs, "sparse")
    routes, selected = (
        np.moveaxis(np.asarray(x_BLTk), 1, 2)
        for x_BLTk in (
            found.routes_BLTK[:, jnp.asarray(routing_layers(CONFIG))],
            found.selected_BLTk[:, jnp.asarray(selecting_layers(CONFIG))],
        )
    )
    return [
        dataclasses.replace(
            each,
            routes_TLK=routes[number, : len(each.tokens_T)].astype(np.uint8),
            selected_TL=coded(selected[number, : len(each.tokens_T)]),
        )
        for number, each in enumerate(drawn())
    ]


SAMPLED = sum(int(each.sampled_T[1:].sum()) for each in drawn())


def batches(trajectories) -> tuple[dict, dict]:
    """The same trajectories in rows of their own, and packed into half as many."""
    rng = np.random.default_rng(1)
    near = [rng.normal(-4, 0.3, (len(LENGTHS), WIDTH)).astype(np.float32) for _ in range(2)]
    advantages = np.repeat(rng.normal(size=(len(LENGTHS), 1)).astype(np.float32), WIDTH, axis=1)
    found = []
    for layout in (None, packed_rows(list(map(sum, LENGTHS)), WIDTH, 2)):
        batch = batch_of(trajectories, WIDTH, 0, layout)
        batch |= {
            "sampler_logprobs": of_trajectories(batch, near[0]),
            "old_logprobs": of_trajectories(batch, near[0]),
            "reference_logprobs": of_trajectories(batch, near[1]),
            "advantages": of_trajectories(batch, advantages),
            # As if all were of one prompt.
            "group_tokens": np.where(batch["mask"], np.float32(SAMPLED), 0),
        }
        found.append(jax.tree.map(jnp.asarray, batch))
    return found[0], found[1]


# A clip, a penalty and an entropy; ratios and means over completions; means over prompts.
SPECS = ("dr_grpo?kl=0.1&entropy=0.01", "gspo?kl=0.1", "gmpo", "scale_rl?off_policy=0.1")
ROWS = [get_algorithm(spec, max_completion=20) for spec in SPECS]


@functools.partial(jax.jit, static_argnums=(0, 1))
def step_of(microbatches: int, number: int, variables, batch):
    """Gradients, means, maxima and counts; not the balance loss, which a row is a sequence to."""
    objective = policy_objective(CONFIG, TRAIN, ROWS[number], 0.8)
    count = jnp.zeros((), jnp.int32)
    params, router = variables["params"], variables["router"]
    state = TrainState(count, params, router, (), skipped=count, skipped_in_row=count)
    gradients, means, totals = loss_and_gradient(
        objective, jax.tree.map(lambda _: True, params), state, batch, microbatches
    )
    means.pop("balance")
    return gradients, means, totals.maxima, totals.counts_LE


@pytest.mark.heavy
@pytest.mark.parametrize("algorithm", SPECS)
def test_loss_and_gradient_are_those_of_rows_of_their_own(algorithm):
    """With records done again: float32 sums in another order."""
    alone, packed = batches(recorded())
    assert packed["tokens"].shape[0] == 4 and packed["routes"].shape[0] == 4
    given = SPECS.index(algorithm), tiny.variables(CONFIG)
    assert_rounding(step_of(1, *given, packed), step_of(1, *given, alone))


@pytest.mark.heavy
@pytest.mark.parametrize("algorithm", SPECS)
def test_microbatches_of_packed_rows_add_up(algorithm):
    _, packed = batches(recorded())
    given = SPECS.index(algorithm), tiny.variables(CONFIG), packed
    assert_rounding(step_of(2, *given), step_of(1, *given))


def assert_rounding(found, expected) -> None:
    """Sums of some hundred float32 terms, of the size of the largest gradient: 0.1 to 10."""
    largest = tiny.tree_max(expected[0])
    assert largest > 0.05
    tiny.assert_close(found, expected, rtol=2e-5, atol=4e-6 * max(largest, 1))


@pytest.mark.heavy
def test_what_layers_choose_by_themselves_is_the_same_in_company():
    alone, packed = batches(drawn())
    expected = score(alone)[packed["trajectory"], packed["positions"]]
    tiny.assert_close(score(packed), jnp.where(packed["mask"], expected, 0.0), atol=1e-5)


def score(batch):
    """Log-probs of about -4, of the same model: float32 sums in another order."""
    return jitted_score(CONFIG, "sparse", 0.8, tiny.variables(CONFIG), batch)


jitted_score = jax.jit(logprobs_at_tokens, static_argnums=(0, 1, 2))


def test_a_record_that_stayed_in_its_sequence_would_be_seen():
    """Keys by their positions in the sequence, and not in the row, are other keys."""
    alone, packed = batches(recorded())
    shift_BT = jnp.argmax(packed["segments"][:, None] == packed["segments"][..., None], axis=-1)
    selected = packed["selected"]
    unshifted = jnp.where(selected < 0, -1, selected - shift_BT[:, None, :, None])
    right, wrong = score(packed), score(packed | {"selected": unshifted})
    expected = score(alone)[packed["trajectory"], packed["positions"]]
    mask_BT = packed["mask"]
    tiny.assert_close(right, jnp.where(mask_BT, expected, 0.0), atol=1e-5)
    assert jnp.max(jnp.abs(wrong - right)) > 0.01
