"""Reads the figures of the selection from its static schedule; bench.kernels prints them."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench.schedule import Stretch

PASSES = Path(__file__).parent / "results" / "passes.json"
TOP_K_ROWS = 1_024  # rows whose search is set beside XLA's top_k


def tile_figures(kernel: str, flops: float, cycles: int, spills: int, of_peak: float) -> dict:
    """Returns the figures of one tile of a kernel; `of_peak` is its share of the peak."""
    return {
        "kernel": kernel,
        "tile_gflop": round(flops / 1e9, 3),
        "tile_cycles": cycles,
        "of_peak": round(of_peak, 3),
        "spills": spills,
    }


class Search(NamedTuple):
    """The stretches of the selection behind its scores, for eight rows at a time.

    The code counts the scores, searches the threshold in passes, looks for the last tie where there
    are any, and writes the bits; each is a loop over words of 4096 keys.
    """

    parts: list[Stretch]
    search: int  # index of the loop over words of a pass
    ties: int  # index of the loop over words of a pass that looks for a position
    count: Stretch
    write: Stretch
    write_tied: Stretch

    @classmethod
    def find(cls, parts: list[Stretch]) -> "Search":
        """Recognises the stretches by their loops."""
        search, ties = (index for index, part in enumerate(parts) if part.depth == 4 and part.loop)
        write, write_tied = (
            next(part for part in parts[index + 1 :] if part.depth == 3 and part.loop)
            for index in (search, ties)
        )
        count = [part for part in parts[: search - 1] if part.depth == 3 and part.loop][-1]
        return cls(parts, search, ties, count, write, write_tied)

    def cycles(self, words: float, passes: float, tie_passes: int) -> float:
        """Returns the cycles of eight rows of so many words; without ties `tie_passes` is 0."""
        once = sum(part.bundles for part in self.parts if part.depth == 2)
        write = self.write_tied if tie_passes else self.write
        ends = words * (self.count.bundles + write.bundles)
        return (
            once
            + ends
            + self._loop(self.search, words) * passes
            + (self._loop(self.ties, words) * tie_passes)
        )

    def _loop(self, index: int, words: float) -> float:
        before, body, behind = self.parts[index - 1 : index + 2]
        return before.bundles + words * body.bundles + behind.bundles


def selection_figures(
    parts: list[Stretch], L: int, totals: Callable[..., dict], rate: float, peak: float
) -> dict:
    """Returns the figures of the selection: scoring, tile by tile, then the search.

    Args:
      parts: its schedule.
      L: tokens.
      totals: (cycles, flops, bytes) -> figures, see `Device.totals`.
      rate: cycles a second of all cores.
      peak: FLOPs a cycle of a core.
    """
    from bench.kernel_programs import C, I, causal_tiles, stored
    from kernels.bitmask import KEYS, num_words
    from kernels.selection import ROWS, most_keys, most_queries
    from kernels.threshold import position_bits

    queries = most_queries(L)
    keys = most_keys(queries)
    tile, search = max(parts, key=lambda part: part.bundles), Search.find(parts)
    passes = {
        row["scores"]: row for row in json.loads(PASSES.read_text())["rows"] if row["length"] == L
    }

    mean_words = statistics.mean(-(-(first + queries) // KEYS) for first in range(0, L, queries))
    searched = L / ROWS * search.cycles(mean_words, passes["weighted"]["mean"], tie_passes=0)
    full_rows = {}
    for scores, row in passes.items():
        tie_passes = position_bits(L) if row["tied"] else 0
        full_rows[scores] = {
            which: round(
                TOP_K_ROWS / ROWS * search.cycles(L / KEYS, row[which], tie_passes) / rate * 1e3, 3
            )
            for which in ("mean", "most")
        }

    tiles, flops = causal_tiles(L, queries, keys), 2 * queries * keys * I * C
    bytes_ = tiles * keys * 2 * C + L * (I * 2 * C + 4 * stored(I + 1) + 4 * num_words(L))
    of_peak = flops / tile.bundles / peak
    return tile_figures("select", flops, tile.bundles, tile.spills, of_peak) | {
        "length": L,
        "queries": queries,
        "keys": keys,
        "scoring_mcycles": round(tiles * tile.bundles / 1e6, 1),
        "search_mcycles": round(searched / 1e6, 1),
        "whole": totals(tiles * tile.bundles + searched, tiles * flops, bytes_),
        "search_1024_full_rows_ms": full_rows,
    }
