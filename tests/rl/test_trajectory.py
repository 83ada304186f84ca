"""A trajectory becomes a row: read as a whole, learnt from where the policy sampled it."""

import dataclasses

import numpy as np
import pytest

from errors import UserError
from rl.trajectory import Role, batch_of
from tests.trajectories import trajectory


def test_rows_by_hand():
    """A whole one, and one with a tool's output in its midst: it is read and not learnt from."""
    plain = trajectory([4, 5], [8, 9], group=5)
    roles_T = np.asarray([Role.PROMPT, Role.MODEL, Role.TOOL, Role.TOOL, Role.MODEL], np.int8)
    tool = dataclasses.replace(
        trajectory([4], [8, 6, 7, 9], group=6),
        roles_T=roles_T,
        logprobs_T=np.asarray([0, -2, 0, 0, -3], np.float32),
        log_kept_T=np.asarray([0, -0.5, 0, 0, 0], np.float32),
        versions_T=np.asarray([-1, 2, -1, -1, 3]),
    )
    batch = batch_of([plain, tool], width=6, pad=1)
    expected = {
        "tokens": [[4, 5, 8, 9, 1, 1], [4, 8, 6, 7, 9, 1]],
        "positions": [[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 0]],
        "segments": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]],
        "mask": [[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 0]],
        "trajectory": [[0, 0, 0, 0, -1, -1], [1, 1, 1, 1, 1, -1]],
        "group": [[5, 5, 5, 5, -1, -1], [6, 6, 6, 6, 6, -1]],
        "sampler_logprobs": [[0, 0, -1, -1, 0, 0], [0, -2, 0, 0, -3, 0]],
        "log_kept": [[0] * 6, [0, -0.5, 0, 0, 0, 0]],
        "versions": [[-1, -1, 0, 0, -1, -1], [-1, 2, -1, -1, 3, -1]],
    }
    assert batch.keys() == expected.keys()
    for name, rows in expected.items():
        np.testing.assert_array_equal(batch[name], rows, err_msg=name)
    assert batch["mask"].dtype == bool and batch["tokens"].dtype == np.int32
    assert tool.completion.tolist() == [8, 6, 7, 9] and tool.prompt_length == 1


def test_a_trajectory_that_is_too_long_is_named():
    with pytest.raises(UserError, match="a trajectory has 4 tokens, more than the 3 of a row"):
        batch_of([trajectory([4, 5], [8, 9])], width=3, pad=1)
