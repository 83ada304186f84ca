"""bench.twilight reads what decoding would read, however decoding laid the experts out."""

import functools

import numpy as np
import pytest

from bench import twilight
from model.decode_weights import decode_weights
from tests.tiny import MODEL, batch_of, variables

ROWS = {"side by side": 1, "as they are": 4_000}  # layout of the experts' weights -> rows
TOP_P = 0.5


@functools.cache
def measured(stage: str, layout: str, top_p: float):
    weights = decode_weights(MODEL, variables(MODEL), ROWS[layout])
    assert weights.side_by_side == (layout == "side by side")
    batch = {name: np.asarray(rows) for name, rows in batch_of().items()}
    return twilight.measure(MODEL, weights, batch, stage, top_p)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("stage", "layout"), [("sparse", "side by side"), ("dense", "as they are")]
)
def test_all_of_attention_leaves_nothing_out_and_less_does(stage, layout):
    whole, (nats_B, count_B) = measured(stage, layout, 1.0)
    less, (less_B, same_B) = measured(stage, layout, TOP_P)
    assert whole["kept"] == whole["of"] and whole["output_error"] == 0
    assert whole["true_mass"] == pytest.approx(1, abs=1e-5)
    assert 1 <= less["kept"] < less["of"] == whole["of"]
    assert 0 < less["true_mass"] < 1 and less["output_error"] > 0
    np.testing.assert_array_equal(count_B, same_B)
    assert np.any(less_B != nats_B)
    assert twilight.loss_change(nats_B, nats_B, count_B) == {
        "nll": pytest.approx(nats_B.sum() / count_B.sum(), abs=1e-5),
        "nll_change": 0.0,
        "error": 0.0,
    }


@pytest.mark.heavy
@pytest.mark.parametrize("stage", ["sparse", "dense"])
def test_the_layout_of_the_experts_changes_no_figure(stage):
    """The tolerance is that of rounding to five digits, and of another order of summation."""
    (side_by_side, (nats_B, count_B)), (plain, (plain_B, same_B)) = (
        measured(stage, layout, TOP_P) for layout in ROWS
    )
    assert side_by_side["kept_by_layer"] == pytest.approx(plain["kept_by_layer"])
    for name in side_by_side.keys() - {"kept_by_layer"}:
        assert side_by_side[name] == pytest.approx(plain[name], abs=2e-5), name
    np.testing.assert_allclose(nats_B, plain_B, rtol=1e-5)
    np.testing.assert_array_equal(count_B, same_B)
