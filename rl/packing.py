"""Which trajectories share a row: as many rows as are needed, of a few numbers that may be.

A row is as wide as the longest trajectory may be, so each alone always fits. Mostly they are
shorter, and a row then has several, each a segment of its own (`rl.trajectory.batch_of`).
"""

from collections.abc import Sequence

from errors import UserError


def packed_rows(
    lengths: Sequence[int], width: int, multiple: int, most: int | None = None
) -> list[list[int]]:
    """Returns for each row the trajectories that it has, by their places, in order.

    There are as many rows as there may be, or a half, a quarter, ... of them: the fewest of those
    which hold all, so a run has few shapes of a batch, each compiled once: at most
    log2(most / multiple) + 1.

    The longest goes first, each into the row that has the most room: rows become alike, and none is
    empty where there are as many trajectories, so that devices, microbatches and minibatches have
    alike to do.

    Args:
      lengths: tokens of each trajectory.
      width: tokens of a row.
      multiple: the number of rows is a multiple of it, as `most` is: of what they are divided by.
      most: how many rows there may be, at least one a trajectory, which is the default.

    Raises:
      UserError: a trajectory is longer than a row.
    """
    if max(lengths) > width:
        raise UserError(f"a trajectory has {max(lengths)} tokens, more than the {width} of a row")
    count = most or len(lengths)
    rows = _spread(lengths, count)
    while count % (2 * multiple) == 0:
        count //= 2
        fewer = _spread(lengths, count)
        if any(sum(lengths[place] for place in row) > width for row in fewer):
            break
        rows = fewer
    return rows


def _spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Returns so many rows of about the same length, each in the order of the trajectories."""
    rows: list[list[int]] = [[] for _ in range(count)]
    total = [0] * count
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        least = total.index(min(total))
        rows[least].append(place)
        total[least] += lengths[place]
    return [sorted(row) for row in rows]
