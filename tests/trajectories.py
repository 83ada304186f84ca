"""Trajectories by hand, for tests of what becomes of them."""

from collections.abc import Sequence

import numpy as np

from rl.generate import Completion
from rl.trajectory import LENGTH, STOP, Role, Trajectory


def trajectory(
    prompt: Sequence[int], sampled: Sequence[int], *, cut: bool = False, group: int = 0
) -> Trajectory:
    """A prompt and what was sampled after it, each token with log-probability -1."""
    roles_T = np.asarray([Role.PROMPT] * len(prompt) + [Role.MODEL] * len(sampled), np.int8)
    is_sampled_T = roles_T == Role.MODEL
    return Trajectory(
        np.asarray([*prompt, *sampled], np.int32),
        roles_T,
        np.where(is_sampled_T, -1.0, 0.0).astype(np.float32),
        np.zeros(len(roles_T), np.float32),
        np.where(is_sampled_T, 0, -1).astype(np.int32),
        LENGTH if cut else STOP,
        group,
    )


def completion(text: str, length: int = 2, *, cut: bool = False, group: int = 0) -> Completion:
    """A text of so many tokens after a prompt of three; `cut` before its stop token."""
    return Completion(trajectory([1] * 3, [5] * length, cut=cut, group=group), text)
