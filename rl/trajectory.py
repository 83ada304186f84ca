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
      routes_TLK: where it is recorded, the experts of each token in each layer that has any; -1
        for a token that was not read.
      selected_TLk: where it is recorded, the keys that each token attended to in each layer that
        selects: positions in order, then -1.
    """

    tokens_T: np.ndarray
    roles_T: np.ndarray
    logprobs_T: np.ndarray
    log_kept_T: np.ndarray
    versions_T: np.ndarray
    ended: str
    group: int = 0
    sample: int = 0
    routes_TLK: np.ndarray | None = None
    selected_TLk: np.ndarray | None = None

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


RECORDS = {"routes": "routes_TLK", "selected": "selected_TLk"}


def batch_of(trajectories: Sequence[Trajectory], width: int, pad: int) -> dict[str, np.ndarray]:
    """Makes rows to learn from, one trajectory a row, padded on the right.

    Args:
      trajectories: B of them.
      width: T, tokens of a row.
      pad: the id that fills a row.

    Returns:
      Arrays [B, T]: tokens, positions and segments as in pretraining; mask, bool, true on sampled
      tokens; group, int32, -1 on padding; sampler_logprobs and log_kept, float32, 0 outside the
      mask. Each stands at the token itself. Where they are recorded, routes [B, L, T, K] and
      selected [B, L, T, k] as `model.record.replay` takes them.

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
    for name in ("routes", "selected"):
        recorded = [getattr(each, RECORDS[name]) for each in trajectories]
        if all(x_TLK is not None and x_TLK.shape[1] for x_TLK in recorded):
            batch[name] = np.stack([_row_of(x_TLK, width) for x_TLK in recorded])
    return batch


def _row_of(x_TLK: np.ndarray, width: int) -> np.ndarray:
    """Returns a record as a row, [L, T, K]; -1 behind its end."""
    x_LTK = np.moveaxis(x_TLK, 0, 1)
    return np.pad(x_LTK, [(0, 0), (0, width - x_LTK.shape[1]), (0, 0)], constant_values=-1)
