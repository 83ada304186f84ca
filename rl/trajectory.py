"""The record of what happened: a sequence with the author of every token.

Tokens in, tokens out: what was sampled is what is learnt from, and is never tokenised again.
*Read* and *learnt from* are two things: attention reads every token of a trajectory, a loss is over
those that the policy sampled.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from errors import UserError
from rl.coding import CodedSets
from rl.records import RECORDS, experts_of, support_words


class Role(enum.IntEnum):
    """Who wrote a token."""

    PADDING = 0
    PROMPT = 1
    MODEL = 2  # the policy sampled it
    TOOL = 3  # the output of a tool, or another's turn
    INJECTED = 4  # put into the policy's mouth: a forced phrase


STOP, LENGTH, UNFINISHED = "stop", "length", "unfinished"
"""Why a trajectory ended: it sampled one of its stop ids, or all the tokens that it may sample; or
it has not ended yet."""


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
      ended: STOP, LENGTH or UNFINISHED.
      group: the number of its prompt among those of a step; advantages compare within it.
      sample: its number among the completions of that prompt.
      spans: what parts of it are for: name -> its spans in order, each [start, end) in tokens
        (rl/spans.py). Where it was not asked for there are none.
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
    spans: Mapping[str, Sequence[tuple[int, int]]] = dataclasses.field(default_factory=dict)
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
    trajectories: Sequence[Trajectory],
    width: int,
    pad: int,
    layout: Sequence[Sequence[int]] | None = None,
    records: Collection[str] = RECORDS,
) -> dict[str, np.ndarray]:
    """Makes rows to learn from, padded on the right.

    Args:
      trajectories: N of them.
      width: T, tokens of a row.
      pad: the id that fills a row.
      layout: for each of B rows the trajectories that it has, by their places, one behind the other
        (`rl.packing.packed_rows`); by default each is a row of its own.
      records: which records there are to be, of those that all trajectories have.

    Returns:
      Arrays [B, T]: tokens, positions and segments as in pretraining, each trajectory a segment;
      mask, bool, true on sampled tokens, but for a trajectory's first, which nothing predicts;
      trajectory and group, int32, its place among the N and its group, -1 on padding;
      sampler_logprobs and log_kept, float32, 0 where nothing was sampled; versions, int32, -1
      there. Each stands at the token itself. Where they are recorded, routes [B, L, T, K] and
      selected [B, L, T, k] as `model.record.replay` takes them: keys by where they stand in the
      row; and support [B, T, W] as `model.heads.token_logprobs` does. With it sampler_logprobs are
      of the distribution over it.

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
        "versions": np.full(shape, -1, np.int32),
    }
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
                "versions": trajectory.versions_T,
            }
            for name, value in values.items():
                batch[name][row, start:end] = value
            start = end
    batch |= _recorded_rows(trajectories, records, layout, width)
    if "support" in batch:
        batch["sampler_logprobs"] -= batch["log_kept"]
    return batch


def _recorded_rows(
    trajectories: Sequence[Trajectory],
    records: Collection[str],
    layout: Sequence[Sequence[int]],
    width: int,
) -> dict[str, np.ndarray]:
    """Returns the records that `batch_of` adds to its rows."""
    rows = {}

    def add(name: str, decoded: Sequence[Callable[[], np.ndarray] | None], fill: int) -> None:
        """Adds a record [B, T, ...], given for each trajectory by a function that decodes it."""
        if name not in records or not any(decoded):
            return
        for row, places in enumerate(layout):
            start = 0
            for place in places:
                decode, length = decoded[place], len(trajectories[place].tokens_T)
                if decode:
                    x_T = decode()
                    if name not in rows:
                        shape = len(layout), width, *x_T.shape[1:]
                        rows[name] = np.full(shape, fill, np.int32)
                    # Keys are said by where they stand in the row.
                    moved = name == "selected" and start > 0
                    rows[name][row, start : start + length] = (
                        np.where(x_T < 0, x_T, x_T + start) if moved else x_T
                    )
                start += length

    routes = [each.routes_TLK for each in trajectories if each.routes_TLK is not None]
    if len(routes) == len(trajectories):
        add("routes", [functools.partial(experts_of, each) for each in routes], -1)
    selected = [each.selected_TL for each in trajectories if each.selected_TL is not None]
    if len(selected) == len(trajectories):
        add("selected", [each.lists for each in selected], -1)
    restricted = [each.support_T for each in trajectories]
    words = [functools.partial(support_words, each) if each else None for each in restricted]
    add("support", words, 0)
    for name in rows.keys() & {"routes", "selected"}:
        rows[name] = np.moveaxis(rows[name], 1, 2)
    return rows
