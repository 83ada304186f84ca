"""The record of what happened: a sequence with the author of every token.

Tokens in, tokens out: what was sampled is what is learnt from, and is never tokenised again.
*Read* and *learnt from* are two things: attention reads every token of a trajectory, a loss is over
those that the policy sampled.
"""

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np

from errors import UserError


class Role(enum.IntEnum):
    """Who wrote a token."""

    PADDING = 0
    PROMPT = 1
    MODEL = 2  # the policy sampled it
    TOOL = 3  # the output of a tool, or another's turn
    INJECTED = 4  # put into the policy's mouth: a forced phrase


STOP, LENGTH = "stop", "length"
"""Why a trajectory ended: it sampled one of its stop ids, or all the tokens that it may sample."""


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A prompt and what followed it: T tokens, on the host.

    Attributes:
      tokens_T: int32 ids.
      roles_T: int8, the `Role` of each.
      logprobs_T: float32, the log-probability of each token that was sampled, at the sampling
        temperature and over the whole vocabulary; 0 elsewhere.
      log_kept_T: float32, the logarithm of the share of probability that it was drawn from.
      versions_T: int32, the version of the weights that sampled it; -1 elsewhere.
      ended: STOP or LENGTH.
      group: the number of its prompt among those of a step; advantages compare within it.
      sample: its number among the completions of that prompt.
    """

    tokens_T: np.ndarray
    roles_T: np.ndarray
    logprobs_T: np.ndarray
    log_kept_T: np.ndarray
    versions_T: np.ndarray
    ended: str
    group: int = 0
    sample: int = 0

    @property
    def sampled_T(self) -> np.ndarray:
        """Whether the policy sampled a token, bool."""
        return self.roles_T == Role.MODEL

    @property
    def prompt_length(self) -> int:
        """The number of tokens before the first that follows the prompt."""
        return int(np.argmax(np.append(self.roles_T, Role.PADDING) != Role.PROMPT))

    @property
    def completion(self) -> np.ndarray:
        """The ids behind the prompt, int32."""
        return self.tokens_T[self.prompt_length :]


def batch_of(trajectories: Sequence[Trajectory], width: int, pad: int) -> dict[str, np.ndarray]:
    """Makes rows to learn from, one trajectory a row, padded on the right.

    Args:
      trajectories: B of them.
      width: T, tokens of a row.
      pad: the id that fills a row.

    Returns:
      Arrays [B, T]: tokens, positions and segments as in pretraining; mask, bool, true on sampled
      tokens; group, int32, -1 on padding; sampler_logprobs and log_kept, float32, 0 outside the
      mask. Each stands at the token itself.

    Raises:
      UserError: a trajectory is longer than a row.
    """
    shape = len(trajectories), width
    batch = {
        "tokens": np.full(shape, pad, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segments": np.zeros(shape, np.int32),
        "mask": np.zeros(shape, bool),
        "group": np.full(shape, -1, np.int32),
        "sampler_logprobs": np.zeros(shape, np.float32),
        "log_kept": np.zeros(shape, np.float32),
    }
    for row, trajectory in enumerate(trajectories):
        length = len(trajectory.tokens_T)
        if length > width:
            raise UserError(f"a trajectory has {length} tokens, more than the {width} of a row")
        values = {
            "tokens": trajectory.tokens_T,
            "positions": np.arange(length),
            "segments": 1,
            "mask": trajectory.sampled_T,
            "group": trajectory.group,
            "sampler_logprobs": trajectory.logprobs_T,
            "log_kept": trajectory.log_kept_T,
        }
        for name, value in values.items():
            batch[name][row, :length] = value
    return batch
