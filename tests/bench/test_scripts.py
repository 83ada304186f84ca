"""Every script of bench/ that needs nothing but this project can be imported, and computes what it
prints; what it does besides compiling and taking time is done once, small.
"""

import importlib
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from bench import (
    decode,
    kernel_programs,
    kernels,
    passes,
    selection,
    selection_schedule,
    side_by_side,
    workload,
)
from bench.schedule import CodeBlock

# Run in separate environments, which have the other projects.
FOREIGN = {"maxtext_tiny", "transformers_tiny", "trl_tiny"}
SCRIPTS = sorted(
    path.stem
    for path in pathlib.Path(decode.__file__).parent.glob("*.py")
    if path.stem not in FOREIGN | {"__init__"}
)


def printed(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize("name", SCRIPTS)
def test_its_docstring_is_its_help_and_says_how_it_is_called(name):
    module = importlib.import_module(f"bench.{name}")
    is_command = hasattr(module, "command")
    assert f"python -m bench.{name}" in (module.__doc__ or "") or not is_command


def block(depth: int, bundles: int, loop: bool = False, mxu: float = 0.0) -> CodeBlock:
    return CodeBlock(depth, loop, bundles, mxu, 0)


@pytest.mark.parametrize("kind", kernels.CLOCK)
def test_decode_counts_a_rows_cycles_and_bytes(kind):
    attend = [
        block(2, 80),
        *(block(2, bundles, mxu=0.5) for bundles in (1_200, 1_200, 300, 300)),
    ]
    select = [
        block(1, 400, mxu=0.5),
        block(2, 20, loop=True),
        *(block(2, bundles, mxu=0.1) for bundles in (100, 50, 200)),
    ]
    found = decode.figures(kind, 1e12, {16: attend}, select)
    (heads,), row = found["attention"], found["rows"][-1]
    cycles = (
        # The first 256 copies, sixteen at a time; seven chunks among the copies of the next; the
        # last without.
        80 * 16 + 7 * 1_200 + 300
    )
    assert heads["cycles"] == cycles and heads["first_copies"] == round(80 * 16 / cycles, 3)
    assert heads["microseconds"] == round(cycles / kernels.CLOCK[kind][0] * 1e6, 2), "a core's"
    assert row["context"] == 131_072 and row["cycles_of_selection"] == {
        "score": 64 * 400,
        "count": decode.PASSES * 8 * 20,
        "list": 8 * 150 + 8 * 50 + 200,
    }
    assert (
        row["bytes"]["indexer_keys"] == 131_072 * 256 and row["bytes"]["latents"] == 2_048 * 1_536
    )
    assert row["microseconds_of_selection"] == round(
        sum(row["cycles_of_selection"].values()) / kernels.CLOCK[kind][0] * 1e6, 2
    )


@pytest.mark.parametrize("L", kernels.LENGTHS)
def test_the_selections_cycles_are_added_up(L):
    """Of a schedule whose code blocks all differ in length."""
    tile, fill, count, head, one, tail, write, ties, last = 5_000, 3, 40, 20, 38, 30, 50, 60, 80
    parts = [
        *(
            block(1, 36, loop=True),
            block(1, tile),
            block(2, 17, loop=True),
            block(3, fill, loop=True),
            block(2, 8),
            block(3, count, loop=True),
        ),
        *(
            block(2, 69),
            block(3, head, loop=True),
            block(4, one, loop=True),
            block(3, tail),
            block(2, 22),
            block(3, write, loop=True),
        ),
        *(
            block(3, 9),
            block(2, 8),
            block(3, 7, loop=True),
            block(4, ties, loop=True),
            block(3, 15),
            block(3, last, loop=True),
            block(2, 31),
        ),
    ]
    found = selection_schedule.selection_figures(
        parts, L, lambda cycles, flops, bytes_: {"cycles": cycles, "flops": flops}, 1e9, 131_072
    )
    key_blocks = L // 4_096
    counted = {
        row["scores"]: row
        for row in json.loads(selection_schedule.PASSES.read_text())["rows"]
        if row["length"] == L
    }
    for scores, row in counted.items():
        group = (
            155
            + row["most"] * (head + tail + key_blocks * one)
            + key_blocks * (count + (last if row["tied"] else write))
        )
        group += (L - 1).bit_length() * (7 + 15 + key_blocks * ties) if row["tied"] else 0
        assert found["search_1024_full_rows_ms"][scores]["most"] == pytest.approx(
            1_024 / 8 * group / 1e6, abs=6e-4
        ), scores
    assert found["queries"] * found["keys"] == 65_536, "pairs of a tile"
    mean = (
        sum(-(-(first + 128) // 512) for first in range(0, L, 128))
        if L < 131_072
        else sum(-(-(first + 64) // 1_024) for first in range(0, L, 64))
    )
    assert (
        found["whole"]["flops"] == mean * 65_536 * 2 * 64 * 128
        and found["whole"]["cycles"] > mean * tile
    )
    assert found["of_peak"] == round(2 * 65_536 * 64 * 128 / tile / 131_072, 3)


def test_arguments_are_random_but_for_masks_and_segments():
    program = kernel_programs.splash_program(256, causal=False, heads=2)
    q, k, _, mask = kernels.random_arguments(program)
    assert q.dtype == jnp.bfloat16 and not np.array_equal(q, k)
    np.testing.assert_array_equal(mask[0], np.tril(np.ones((256, 256), bool)))
    assert not np.any(
        kernels.random_arguments(kernel_programs.programs(256, heads=2)["select"])[-1] - 1
    ), "one segment"


def test_passes_are_counted(capsys, monkeypatch):
    monkeypatch.setattr(passes, "LENGTHS", (512,))
    monkeypatch.setattr(passes, "TOPK", 64)
    monkeypatch.setattr(passes, "SEEDS", 2)
    passes.main()
    rows = printed(capsys)["rows"]
    assert [row["scores"] for row in rows] == list(passes.KINDS)
    assert all(1 < row["mean"] <= row["most"] < 60 for row in rows)


def test_selection_by_counting_is_the_sorts(capsys, monkeypatch):
    monkeypatch.setattr(selection, "SHAPES", (((2, 16, 16), 4),))
    monkeypatch.setattr(selection, "REPEATS", 1)
    selection.main()
    assert printed(capsys)["rows"][0]["same"]


def test_the_ratio_of_two_commands_is_that_of_their_speeds(capsys, monkeypatch):
    commands = [
        f'{sys.executable} -c \'print("{{\\"tokens_per_s\\": {speed}}}")\'' for speed in (3, 2)
    ]
    monkeypatch.setattr(sys, "argv", ["side_by_side", "--rounds=2", *commands])
    side_by_side.main()
    assert printed(capsys)["ratio"] == 1.5


def test_only_calls_after_the_first_two_are_timed():
    calls = []
    assert len(workload.seconds(calls.append, 3)) == 3 and calls == [-2, -1, 0, 1, 2]
