"""The record of what happened: a sequence with the author of every token.

Tokens in, tokens out: what was sampled is what is learnt from, and is never tokenised again.
*Read* and *learnt from* are two things: attention reads every token of a trajectory, a loss is over
those that the policy sampled.
"""

import dataclasses
import enum
from collections.abc import Collection, Sequence

import numpy as np

from errors import UserError
from kernels.bitmask import num_words
from rl.coding import CodedSets
from rl.records import RECORDS, experts_of, support_words


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
      routes_TLK: where it is recorded, the experts of each token in each layer that has any, of an
        unsigned type, whose largest number stands for none: `rl.records.experts_of`.
      selected_TL: where it is recorded, the positions of the keys that each token attended to in
        each layer that selects; none for a token that was not read.
      support_T: where it is recorded, the ids that each token was drawn from; all of them for one
        that was not sampled.
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
    selected_TL: CodedSets | None = None
    support_T: CodedSets | None = None

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


def batch_of(
    trajectories: Sequence[Trajectory], width: int, pad: int, records: Collection[str] = RECORDS
) -> dict[str, np.ndarray]:
    """Makes rows to learn from, one trajectory a row, padded on the right.

    Args:
      trajectories: B of them.
      width: T, tokens of a row.
      pad: the id that fills a row.
      records: which records there are to be, of those that all trajectories have.

    Returns:
      Arrays [B, T]: tokens, positions and segments as in pretraining; mask, bool, true on sampled
      tokens; group, int32, -1 on padding; sampler_logprobs and log_kept, float32, 0 outside the
      mask. Each stands at the token itself. Where they are recorded, routes [B, L, T, K] and
      selected [B, L, T, k] as `model.record.replay` takes them; and support [B, T, W] as
      `model.heads.token_logprobs` does. With it sampler_logprobs are of the distribution over it.

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
    routes = [each.routes_TLK for each in trajectories if each.routes_TLK is not None]
    if "routes" in records and len(routes) == len(trajectories):
        batch["routes"] = np.stack([_row_of(experts_of(each), width) for each in routes])
    selected = [each.selected_TL for each in trajectories if each.selected_TL is not None]
    if "selected" in records and len(selected) == len(trajectories):
        batch["selected"] = np.stack([_row_of(each.lists(), width) for each in selected])
    support = [(row, each.support_T) for row, each in enumerate(trajectories) if each.support_T]
    if "support" in records and support:
        batch["support"] = np.zeros((*shape, num_words(support[0][1].width)), np.int32)
        for row, support_T in support:
            batch["support"][row, : len(support_T)] = support_words(support_T)
        batch["sampler_logprobs"] -= batch["log_kept"]
    return batch


def _row_of(x_TLK: np.ndarray, width: int) -> np.ndarray:
    """Returns a record as a row, [L, T, K]; -1 behind its end."""
    x_LTK = np.moveaxis(x_TLK, 0, 1)
    return np.pad(x_LTK, [(0, 0), (0, width - x_LTK.shape[1]), (0, 0)], constant_values=-1)
