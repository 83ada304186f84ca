"""Who may see whom: causality, segments, padding, other rows. And what must change nothing:
rematerialisation, unrolling, the compute type.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import STAGES
from model.segments import shift_left
from tests import tiny
from tests.tiny import VOCAB, T

ROUNDING = {
    "rtol": 2e-5,
    "atol": 2e-5,
}  # float32 through four layers, summed in another order; logits are of size 1
CONFIG = tiny.model_config()
CASES = {stage: (stage, CONFIG) for stage in STAGES} | {"hybrid": ("dense", tiny.HYBRID)}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def whole(case):
    """The canonical batch and what the model makes of it."""
    batch = tiny.batch_of()
    return batch, outputs_of(batch, case)


def outputs_of(batch, case):
    stage, config = CASES[case]
    return tiny.forward(config, tiny.variables(config), batch, stage)


def real(x_BTV, batch):
    return jnp.where(batch["segments"][..., None] > 0, x_BTV, 0)


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_the_future_has_no_gradient(case):
    """Every token of the row is another one, so the gradient to row `tokens[s]` of the embedding is
    the gradient to the input at s. MTP of depth 1 reads one token further, by construction, and no
    more. Sparse queries skip keys, so that their past may be 0 too: only the token itself must
    count.
    """
    stage, config = CASES[case]
    tokens_BT = jnp.asarray(np.random.default_rng(0).permutation(VOCAB)[None, :T])
    batch = {
        "tokens": tokens_BT,
        "positions": jnp.arange(T)[None],
        "segments": jnp.ones((1, T), jnp.int32),
    }
    variables = tiny.variables(config)
    direction_D = jax.random.normal(jax.random.key(0), (config.hidden_size,))

    @jax.jit
    def jacobian(embedding_VD):
        def outputs(embedding_VD):
            changed = variables | {"params": variables["params"] | {"embedding": embedding_VD}}
            output = tiny.output_of(config, changed, batch, stage)
            return jnp.stack(
                [output.hidden_BTD[0] @ direction_D, output.mtp_hidden[0][0] @ direction_D]
            )

        return jnp.linalg.norm(jax.jacrev(outputs)(embedding_VD)[:, :, tokens_BT[0]], axis=-1)

    main_TS, mtp_TS = jacobian(variables["params"]["embedding"])
    t_T1, s_S = jnp.arange(T)[:, None], jnp.arange(T)
    assert not jnp.any(main_TS[s_S > t_T1]), "a gradient from the future"
    assert not jnp.any(mtp_TS[s_S > t_T1 + 1])
    assert jnp.all(jnp.diag(main_TS) > 1e-3)
    assert jnp.all(jnp.diag(mtp_TS, 1) > 1e-3), "MTP reads the token one on"
    if stage != "sparse":
        assert jnp.all(main_TS[s_S <= t_T1] > 0) and jnp.all(mtp_TS[s_S <= t_T1] > 0)


def test_the_future_changes_no_value(whole, case):
    """Choices have no gradient: top-k and the router could look ahead unseen by it. Values tell."""
    batch, before = whole
    after = outputs_of(batch | {"tokens": batch["tokens"].at[:, 12:].add(5) % VOCAB}, case)
    tiny.assert_close(after["logits_BTV"][:, :12], before["logits_BTV"][:, :12], **ROUNDING)
    tiny.assert_close(after["mtp_BTV"][0][:, :11], before["mtp_BTV"][0][:, :11], **ROUNDING)
    assert jnp.max(jnp.abs(after["logits_BTV"][1, 12:] - before["logits_BTV"][1, 12:])) > 0.1


def test_segments_do_not_see_each_other(whole, case):
    """The first segment's tokens change; the second's outputs do not. Row 0 is packed 7 + 11, row 2
    is padded on the left, then 12 + 7.
    """
    batch, before = whole
    changed_BT = batch["tokens"].at[0, :7].add(5).at[2, 5:17].add(5) % VOCAB
    after = outputs_of(batch | {"tokens": changed_BT}, case)
    for row, second in ((0, slice(7, 18)), (2, slice(17, 24))):
        tiny.assert_close(
            after["logits_BTV"][row, second], before["logits_BTV"][row, second], **ROUNDING
        )
        tiny.assert_close(
            after["mtp_BTV"][0][row, second], before["mtp_BTV"][0][row, second], **ROUNDING
        )


def test_packed_is_separate(whole, case):
    """Row 0's documents of 7 and 11 tokens as rows of their own: padded on the right, and on the
    left.
    """
    batch, before = whole
    alone = tiny.batch_of(
        (((1, 7), (0, 17)), ((1, 11), (0, 13)), ((0, 17), (1, 7)), ((0, 13), (1, 11))), seed=1
    )
    tokens_BT = (
        alone["tokens"]
        .at[0, :7]
        .set(batch["tokens"][0, :7])
        .at[1, :11]
        .set(batch["tokens"][0, 7:18])
    )
    tokens_BT = (
        tokens_BT.at[2, 17:].set(batch["tokens"][0, :7]).at[3, 13:].set(batch["tokens"][0, 7:18])
    )
    after = outputs_of(alone | {"tokens": tokens_BT}, case)
    for document, rows in (
        (slice(0, 7), ((0, slice(0, 7)), (2, slice(17, 24)))),
        (slice(7, 18), ((1, slice(0, 11)), (3, slice(13, 24)))),
    ):
        for row, where in rows:
            tiny.assert_close(
                after["logits_BTV"][row, where], before["logits_BTV"][0, document], **ROUNDING
            )
            # The last position of a document has no next token for MTP to read: it is no
            # prediction.
            tiny.assert_close(
                after["mtp_BTV"][0][row, where][:-1],
                before["mtp_BTV"][0][0, document][:-1],
                **ROUNDING,
            )


def test_what_padding_holds_changes_nothing(whole, case):
    """Neither outputs nor the layers' statistics. An MTP module reads one token on, which at the
    end of a segment is padding or another document.
    """
    batch, before = whole
    after = outputs_of(
        batch
        | {
            "tokens": jnp.where(
                batch["segments"] > 0, batch["tokens"], (batch["tokens"] + 9) % VOCAB
            )
        },
        case,
    )
    tiny.assert_close(
        real(after["logits_BTV"], batch), real(before["logits_BTV"], batch), **ROUNDING
    )
    tiny.assert_close(after["stats"], before["stats"], rtol=2e-5)


def test_a_row_alone_is_the_row_in_a_batch(whole, case):
    """The other rows become padding with other content: nothing of them is left in the outputs, the
    counts or the losses.
    """
    batch, before = whole
    singles = [outputs_of(tiny.without_rows(batch, [row]), case) for row in range(4)]
    for row, single in enumerate(singles):
        tiny.assert_close(
            real(single["logits_BTV"], batch)[row],
            real(before["logits_BTV"], batch)[row],
            **ROUNDING,
        )
    tiny.assert_close(
        jax.tree.map(lambda *parts: sum(parts), *(single["stats"] for single in singles)),
        before["stats"],
        rtol=2e-5,
    )


def test_padding_is_not_counted(whole, case):
    """Each token is counted K times in each MoE layer, dropless, and the dense layer not at all. In
    the MTP module the last token of a segment, which has no next, is padding.
    """
    batch, before = whole
    counts_LE = before["stats"].router.counts_E
    real_tokens = int(jnp.sum(batch["segments"] > 0))
    with_next = int(
        jnp.sum((shift_left(batch["segments"], 1) == batch["segments"]) & (batch["segments"] > 0))
    )
    config = CASES[case][1]
    expected = [real_tokens * kind.moe for kind in config.kinds] + [with_next]
    chex.assert_trees_all_equal(
        jnp.sum(counts_LE, axis=-1), config.moe.num_experts_per_tok * jnp.asarray(expected)
    )


def test_mtp_shares_embedding_and_head():
    """arXiv 2412.19437, section 2.2: a module owns its merge, its block and its norms."""
    mtp = tiny.variables(CONFIG)["params"]["mtp_0"]
    assert set(mtp) == {"merge", "hidden_norm", "embedding_norm", "block"}
    assert set(tiny.variables(CONFIG)["params"]) == {
        "embedding",
        "head",
        "final_norm",
        "layers_0",
        "layers_1",
        "mtp_0",
        "mtp_norm_0",
    }


SMALL = tiny.model_config(num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0)


def loss_and_gradients(config):
    batch = tiny.batch_of()

    @jax.jit
    def value_and_grad(params, router):
        def loss(params):
            output = tiny.output_of(config, {"params": params, "router": router}, batch, "sparse")
            return jnp.sum(real(jnp.sin(output.hidden_BTD), batch)) + jnp.sum(
                output.stats.indexer.kl
            )

        return jax.value_and_grad(loss)(params)

    variables = tiny.variables(SMALL)
    return value_and_grad(variables["params"], variables["router"])


@pytest.fixture(scope="module")
def plain():
    return loss_and_gradients(SMALL)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "change", [{"remat": "full"}, {"remat": "dots"}, {"scan_unroll": 2}], ids=str
)
def test_how_it_is_computed_changes_nothing(plain, change):
    """The same sums, fused otherwise: gradients are of size 1 to 100."""
    tiny.assert_close(
        loss_and_gradients(dataclasses.replace(SMALL, **change)), plain, rtol=1e-4, atol=1e-3
    )


@pytest.mark.heavy
@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_bfloat16_is_close(stage):
    """bfloat16 keeps 8 bits: 0.4 % a rounding, a few per cent after four layers. The median,
    because a token whose expert or key changes is legitimately far off.
    """
    config = tiny.model_config(dtype="bfloat16")
    batch = tiny.batch_of()
    exact, rounded = (
        outputs_of(batch, stage),
        tiny.forward(config, tiny.variables(config), batch, stage),
    )
    gap = jnp.abs(rounded["logits_BTV"] - exact["logits_BTV"])[batch["segments"] > 0]
    size = jnp.std(exact["logits_BTV"])
    assert 0 < jnp.median(gap) < 0.05 * size
    assert rounded["logits_BTV"].dtype == jnp.float32
