"""Reads the figures of the selection from its static schedule; bench.kernels prints them."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench.schedule import CodeBlock

PASSES = Path(__file__).parent / "results" / "passes.json"
TOP_K_ROWS = 1_024  # rows in the comparison with jax.lax.top_k


def tile_figures(
    kernel: str, flops: float, cycles: int, spills: int, fraction_of_peak: float
) -> dict:
    """Returns the figures of one tile of a kernel."""
    return {
        "kernel": kernel,
        "tile_gflop": round(flops / 1e9, 3),
        "tile_cycles": cycles,
        "of_peak": round(fraction_of_peak, 3),
        "spills": spills,
    }


class Search(NamedTuple):
    """The parts of the top-k kernel that run after scoring, in cycles for 8 rows.

    The kernel (kernels/selection.py) computes the scores and counts those that are allowed. It
    searches for the threshold by regula falsi, a pass over the scores for each bound. Where scores
    tie at the threshold it bisects for the position of the last tied key that is selected. Then it
    writes the bitmask. Each pass is a loop over blocks of 4096 keys.
    """

    blocks: list[CodeBlock]
    search_index: int  # of the loop over key blocks in a pass of the search for the threshold
    tie_index: int  # of the loop over key blocks in a pass of the search for the last tied key
    count: CodeBlock
    write: CodeBlock
    write_tied: CodeBlock

    @classmethod
    def find(cls, blocks: list[CodeBlock]) -> "Search":
        """Recognises the parts of the kernel by the depth of their loops."""
        # In the order of the code, by depth, all but the scoring:
        #
        #   1  the grid
        #   2      groups of 8 rows
        #   3          key blocks: fill what was not scored with -inf
        #   3          key blocks: count the allowed scores                  `count`
        #   3          passes that search for the threshold                  search_index - 1
        #   4              key blocks: count the scores above a bound        search_index
        #   3              (the end of a pass)                               search_index + 1
        #   3          without ties, key blocks: write the bitmask           `write`
        #   3          with ties, passes that search for the last one        tie_index - 1
        #   4              key blocks: count the tied keys before a position tie_index
        #   3              (the end of a pass)                               tie_index + 1
        #   3          with ties, key blocks: write the bitmask              `write_tied`
        search_index, tie_index = (
            index for index, block in enumerate(blocks) if block.depth == 4 and block.loop
        )
        write, write_tied = (
            next(block for block in blocks[index + 1 :] if block.depth == 3 and block.loop)
            for index in (search_index, tie_index)
        )
        loops_before = [
            block for block in blocks[: search_index - 1] if block.depth == 3 and block.loop
        ]
        return cls(blocks, search_index, tie_index, loops_before[-1], write, write_tied)

    def cycles(self, key_blocks: float, passes: float, tie_passes: int) -> float:
        """Returns the cycles of 8 rows.

        Args:
          key_blocks: blocks of 4096 keys in a row.
          passes: passes that search for the threshold.
          tie_passes: passes that search for the last tied key; 0 without ties.
        """
        once = sum(block.bundles for block in self.blocks if block.depth == 2)
        write = self.write_tied if tie_passes else self.write
        count_and_write = key_blocks * (self.count.bundles + write.bundles)
        return (
            once
            + count_and_write
            + self._pass_cycles(self.search_index, key_blocks) * passes
            + (self._pass_cycles(self.tie_index, key_blocks) * tie_passes)
        )

    def _pass_cycles(self, index: int, key_blocks: float) -> float:
        """Returns the cycles of one pass whose loop over key blocks has this index."""
        prologue, body, epilogue = self.blocks[index - 1 : index + 2]
        return prologue.bundles + key_blocks * body.bundles + epilogue.bundles


def selection_figures(
    blocks: list[CodeBlock],
    L: int,
    device_totals: Callable[..., dict],
    cycles_per_second: float,
    flops_per_cycle: float,
) -> dict:
    """Returns the figures of the selection: scoring, tile by tile, then the search.

    Args:
      blocks: the code blocks of the kernel, see `bench.schedule.code_blocks`.
      L: tokens of the sequence.
      device_totals: (cycles, flops, bytes) -> figures, see `bench.kernels.Device.totals`.
      cycles_per_second: of all cores together.
      flops_per_cycle: the peak of one core.
    """
    from bench.kernel_programs import C, I, causal_tiles, stored
    from kernels.bitmask import KEYS, num_words
    from kernels.selection import ROWS, most_keys, most_queries
    from kernels.threshold import position_bits

    queries = most_queries(L)
    keys = most_keys(queries)
    tile, search = max(blocks, key=lambda block: block.bundles), Search.find(blocks)
    passes = {
        row["scores"]: row for row in json.loads(PASSES.read_text())["rows"] if row["length"] == L
    }

    mean_key_blocks = statistics.mean(
        -(-(first + queries) // KEYS) for first in range(0, L, queries)
    )
    search_cycles = (
        L / ROWS * search.cycles(mean_key_blocks, passes["weighted"]["mean"], tie_passes=0)
    )
    full_rows = {}
    for scores, row in passes.items():
        tie_passes = position_bits(L) if row["tied"] else 0
        full_rows[scores] = {
            statistic: round(
                TOP_K_ROWS
                / ROWS
                * search.cycles(L / KEYS, row[statistic], tie_passes)
                / cycles_per_second
                * 1e3,
                3,
            )
            for statistic in ("mean", "most")
        }

    tiles, flops = causal_tiles(L, queries, keys), 2 * queries * keys * I * C
    bytes_ = tiles * keys * 2 * C + L * (I * 2 * C + 4 * stored(I + 1) + 4 * num_words(L))
    fraction_of_peak = flops / tile.bundles / flops_per_cycle
    return tile_figures("select", flops, tile.bundles, tile.spills, fraction_of_peak) | {
        "length": L,
        "queries": queries,
        "keys": keys,
        "scoring_mcycles": round(tiles * tile.bundles / 1e6, 1),
        "search_mcycles": round(search_cycles / 1e6, 1),
        "whole": device_totals(tiles * tile.bundles + search_cycles, tiles * flops, bytes_),
        "search_1024_full_rows_ms": full_rows,
    }
