"""Tensors of Hugging Face checkpoints as slices of our parameters: every layout there and back, by
hand and in blocks.
"""

import numpy as np
import pytest

from checkpoints.hf.layouts import Slice, Tensor
from checkpoints.hf.tensors import Module

MODULE = Module("theirs.", "ours/", (2,))


def numbered(tensor: Tensor) -> np.ndarray:
    """A tensor whose every element has its own value."""
    return np.arange(np.prod(tensor.shape), dtype=np.float32).reshape(tensor.shape)


TENSORS = {
    "as it is": MODULE.same("norm.weight", "norm/scale", (6,)),
    "transposed": MODULE.linear("up.weight", (3,), ("up", (4,))),
    "heads": MODULE.linear("q.weight", (3,), ("query", (4, 2))),
    "heads in": MODULE.linear("o.weight", (2, 3), ("out", (4,))),
    "interleaved": MODULE.linear("kv.weight", (3,), ("key", (2, 4)), ("value", (2, 5))),
    "in groups": MODULE.linear("ba.weight", (3,), ("b", (4,)), ("a", (4,)), groups=2),
    "experts": MODULE.stacked_experts("gate_up", 4, 3, ("gate", 5), ("up", 5)),
    "convolution": MODULE.convolution("conv", 4, ("query", (2, 3)), ("value", (5, 1))),
}


@pytest.mark.parametrize("most", [1, 8, 20, 1000])
@pytest.mark.parametrize("name", TENSORS)
def test_blocks_fill_every_parameter_once_and_come_back(name, most):
    tensor = TENSORS[name]
    rows = numbered(tensor)
    parameters = {
        part.leaf: np.full((3, *part.shape[1:]), np.nan, np.float32) for part in tensor.slices
    }
    for start, stop in tensor.blocks(most):
        decoded = tensor.decode(rows[start:stop], start)
        assert [part for part, _ in decoded] == tensor.slices_of(start, stop)
        for part, values in decoded:
            assert values.shape == part.shape
            assert np.isnan(parameters[part.leaf][part.index]).all()
            parameters[part.leaf][part.index] = values
    for part in tensor.slices:
        assert not np.isnan(parameters[part.leaf][2]).any()
        assert np.isnan(parameters[part.leaf][:2]).all()
    for start, stop in tensor.blocks(most):
        values = [parameters[part.leaf][part.index] for part in tensor.slices_of(start, stop)]
        np.testing.assert_array_equal(tensor.encode(values), rows[start:stop])


def test_the_whole_tensor_is_its_slices():
    for tensor in TENSORS.values():
        assert tuple(tensor.slices_of(0, tensor.shape[0])) == tensor.slices


def test_a_head_has_its_keys_then_its_values():
    tensor = TENSORS["interleaved"]
    rows = numbered(tensor)
    (_, key), (_, value) = tensor.decode(rows, 0)
    np.testing.assert_array_equal(key[0, :, 1], rows[9:13].T)  # [in, head, width]
    np.testing.assert_array_equal(value[0, :, 1], rows[13:18].T)


def test_a_convolution_has_its_oldest_input_last():
    tensor = TENSORS["convolution"]
    rows = numbered(tensor)
    (_, query), _ = tensor.decode(rows, 0)
    np.testing.assert_array_equal(query[0, 0, 1], rows[3:6, 0, -1])  # the newest, of head 1


def test_slices_overlap():
    one = Slice("w", (slice(0, 4), slice(2, 5)))
    two = Slice("w", (slice(3, 9), slice(0, 3)))
    both = one.overlap(two)
    assert both == two.overlap(one) == Slice("w", (slice(3, 4), slice(2, 3)))
    assert both is not None and both.within(two) == (slice(0, 1), slice(2, 3))
    assert one.overlap(Slice("w", (slice(4, 9), slice(2, 5)))) is None
    assert one.overlap(Slice("v", one.index)) is None
