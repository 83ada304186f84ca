"""The record of what happened: a sequence with the author of every token.

Tokens in, tokens out: what was sampled is what is learnt from, and is never tokenised again.
*Read* and *learnt from* are two things: attention reads every token of a trajectory, a loss is over
those that the policy sampled.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence

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
      spans: what parts of it are for: name -> its spans in order, each [start, end) in tokens
        (rl/spans.py). Where it was not asked for there are none.
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
    spans: Mapping[str, Sequence[tuple[int, int]]] = dataclasses.field(default_factory=dict)
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


def batch_of(
    trajectories: Sequence[Trajectory],
    width: int,
    pad: int,
    layout: Sequence[Sequence[int]] | None = None,
) -> dict[str, np.ndarray]:
    """Makes rows to learn from, padded on the right.

    Args:
      trajectories: N of them.
      width: T, tokens of a row.
      pad: the id that fills a row.
      layout: for each of B rows the trajectories that it has, by their places, one behind the other
        (`rl.packing.packed_rows`); by default each is a row of its own.

    Returns:
      Arrays [B, T]: tokens, positions and segments as in pretraining, each trajectory a segment;
      mask, bool, true on sampled tokens, but for a trajectory's first, which nothing predicts;
      trajectory and group, int32, its place among the N and its group, -1 on padding;
      sampler_logprobs and log_kept, float32, 0 where nothing was sampled. Each stands at the token
      itself. Where they are recorded, routes [B, L, T, K] and selected [B, L, T, k] as
      `model.record.replay` takes them: keys by where they stand in the row.

    Raises:
      UserError: a trajectory is longer than a row.
    """
    layout = [[place] for place in range(len(trajectories))] if layout is None else layout
    shape = len(layout), width
    batch = {
        "tokens": np.full(shape, pad, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segments": np.zeros(shape, np.int32),
        "mask": np.zeros(shape, bool),
        "trajectory": np.full(shape, -1, np.int32),
        "group": np.full(shape, -1, np.int32),
        "sampler_logprobs": np.zeros(shape, np.float32),
        "log_kept": np.zeros(shape, np.float32),
    }
    for name, field in RECORDS.items():
        recorded = [getattr(each, field) for each in trajectories]
        if all(x_TLK is not None and x_TLK.shape[1] for x_TLK in recorded):
            _, L, K = recorded[0].shape
            batch[name] = np.full((len(layout), L, width, K), -1, recorded[0].dtype)
    for row, places in enumerate(layout):
        start = 0
        for segment, place in enumerate(places, start=1):
            trajectory = trajectories[place]
            length = len(trajectory.tokens_T)
            if length > width:
                raise UserError(f"a trajectory has {length} tokens, more than the {width} of a row")
            positions_T, end = np.arange(length), start + length
            values = {
                "tokens": trajectory.tokens_T,
                "positions": positions_T,
                "segments": segment,
                "mask": trajectory.sampled_T & (positions_T > 0),
                "trajectory": place,
                "group": trajectory.group,
                "sampler_logprobs": trajectory.logprobs_T,
                "log_kept": trajectory.log_kept_T,
            }
            for name, value in values.items():
                batch[name][row, start:end] = value
            for name in RECORDS.keys() & batch.keys():
                x_LTK = np.moveaxis(getattr(trajectory, RECORDS[name]), 0, 1)
                if name == "selected":
                    x_LTK = np.where(x_LTK < 0, x_LTK, x_LTK + start)
                batch[name][row, :, start:end] = x_LTK
            start = end
    return batch
