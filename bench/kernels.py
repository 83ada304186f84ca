"""The TPU kernels and what a JAX user has in their place, at DeepSeek-V3.2's widths: 16 heads a
device, 2048 keys a query, causal, one sequence.

    .venv-compile/bin/python -m bench.kernels --topology=v6e:2x2          (make test-compile makes
    that environment) python -m bench.kernels                                               on a
    TPU: times, and nothing static

Of a topology nothing is run, so nothing is measured: cycles are those of the compiler's static
schedule, if nothing stalls. A kernel's time is the longer of its cycles and of its bytes at the
data sheet's bandwidth; its bound the longer of its arithmetic at peak and of its bytes. A
selection's passes over a row are those that bench.passes counted. Of XLA's top_k, a sort, there is
XLA's cost model, which is not a schedule. One JSON line.
"""

import contextlib
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

from bench.schedule import Stretch, dumped, stretches
from errors import UserError
from experiment.command_line import Flag, command

# Of the matrix units, and how many cores share a device's work: with them the cycles that a product
# takes in every kernel's schedule come to the peak on the data sheet. v5e and v5p (a core of it)
# take 131072 operations a cycle, v6e and TPU7x 524288.
CLOCK = {"v5e": (1.5e9, 1), "v5p": (1.75e9, 2), "v6e": (1.75e9, 1), "tpu7x": (2.2e9, 1)}
LENGTHS = (8_192, 32_768, 131_072)
PASSES = Path(__file__).parent / "results" / "passes.json"
TOP_K_ROWS = 1_024


def run(topology: str, length: int) -> None:
    found = timed(length) if not topology else static(topology)
    print(json.dumps({"bench": "kernels", "jax": version("jax")} | found))


def static(topology: str) -> dict:
    kind = topology.partition(":")[0]
    if kind not in CLOCK:
        raise UserError(
            f"--topology={topology}: must be of {', '.join(CLOCK)}, whose clocks are known here"
        )
    with contextlib.ExitStack() as stack:
        aside = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        top_k = aside.submit(
            top_k_estimates, topology
        )  # in a process that writes no schedules, as a sort's are long
        directory = stack.enter_context(dumped())  # before JAX is imported
        from bench import kernel_programs as programs
        from kernels.selection import most_queries
        from plan.topology import CHIPS, topology_devices

        device = topology_devices(topology)[0]
        chip, (clock, cores) = CHIPS[device.device_kind], CLOCK[kind]

        def compiled(program: programs.Program) -> None:
            for file in directory.glob("*.txt"):
                file.unlink()
            compile_for(device, program)

        def row(work_of, **named) -> dict:
            """Of a kernel just compiled; work_of: a length -> Work."""
            kernel, runs = work_of(LENGTHS[0]).kernel, work_of(LENGTHS[0]).runs
            parts = stretches(directory, kernel, jumps=len(runs) > 1)
            longest = sorted(
                sorted(range(len(parts)), key=lambda at: -parts[at].bundles)[: len(runs)]
            )
            tile_cycles, spills = (
                sum(run * getattr(parts[at], of) for run, at in zip(runs, longest, strict=True))
                for of in ("bundles", "spills")
            )
            rest = sum(part.bundles for at, part in enumerate(parts) if at not in longest)
            lengths = {}
            for L in LENGTHS:
                work = work_of(L)
                cycles, bytes_ = (
                    work.tiles * tile_cycles + work.rows * rest,
                    work.tiles * work.tile_bytes + work.rows * work.row_bytes,
                )
                lengths[L] = totals(cycles, work.tiles * work.flops, bytes_, work.cores or cores)
            of_peak = work.flops / tile_cycles / (chip.flops / cores / clock)
            return (
                named
                | tile_figures(work.kernel, work.flops, tile_cycles, spills, of_peak)
                | {"lengths": lengths}
            )

        def totals(cycles: float, flops: float, bytes_: float, used: int = cores) -> dict:
            """`used`: cores that it runs on."""
            moved = bytes_ / chip.hbm_bandwidth
            taken, bound = max(cycles / used / clock, moved), max(flops / chip.flops, moved)
            figures = {
                "mcycles": cycles / 1e6,
                "gbytes": bytes_ / 1e9,
                "bound_ms": bound * 1e3,
                "static_ms": taken * 1e3,
                "of_bound": bound / taken,
            }
            return {name: float(f"{figure:.4g}") for name, figure in figures.items()}

        kernels, selection = [], []
        compiled(programs.programs(LENGTHS[0])["attention and gradients"])
        kernels += [row(lambda L, at=at: programs.works(L)[at]) for at in (0, 1)]
        for heads, places in (
            (programs.HEADS, (0, 1)),
            (programs.ALL_HEADS, (1,)),
        ):  # the normaliser is the same
            compiled(programs.programs(LENGTHS[0], heads=heads)["indexer's loss and gradients"])
            kernels += [
                row(
                    lambda L, at=at, heads=heads: programs.loss_works(L, heads, device.device_kind)[
                        at
                    ],
                    heads=heads,
                )
                for at in places
            ]
        rivals = []
        for causal, name in (
            (False, "splash attention, dynamic mask"),
            (True, "splash attention, causal: dense flash"),
        ):
            compiled(programs.splash_program(LENGTHS[0], causal=causal))
            rivals += [
                row(
                    lambda L, at=at, causal=causal: programs.splash_works(L, causal=causal)[at],
                    of=name,
                )
                for at in range(3)
            ]
        schedules = {}  # by the queries of a block, of which fewer fit beside longer rows
        for L in LENGTHS:
            queries = most_queries(L)
            if queries not in schedules:
                compiled(programs.programs(L)["select"])
                schedules[queries] = stretches(directory, "select")
            selection.append(
                selection_figures(
                    schedules[queries], L, totals, cores * clock, chip.flops / cores / clock
                )
            )
        estimates = top_k.result()
    for figures in selection:
        figures["top_k"] = estimates.get(figures["length"])
    return {
        "static": True,
        "topology": topology,
        "libtpu": version("libtpu"),
        "kernels": kernels,
        "selection": selection,
        "rivals": rivals,
    }


def tile_figures(kernel: str, flops: float, cycles: int, spills: int, of_peak: float) -> dict:
    return {
        "kernel": kernel,
        "tile_gflop": round(flops / 1e9, 3),
        "tile_cycles": cycles,
        "of_peak": round(of_peak, 3),
        "spills": spills,
    }


def selection_figures(parts: list[Stretch], L: int, totals, rate: float, peak: float) -> dict:
    """Scoring, tile by tile, then eight rows at a time: a count, the passes and the bits, each a
    loop over words of 4096 keys.
    """
    from bench.kernel_programs import C, I, causal_tiles, stored
    from kernels.bitmask import KEYS, words
    from kernels.selection import ROWS, most_keys, most_queries
    from kernels.threshold import position_bits

    queries = most_queries(L)
    keys = most_keys(queries)
    tile = max(parts, key=lambda part: part.bundles)
    search, ties = (
        at for at, part in enumerate(parts) if part.depth == 4 and part.loop
    )  # loops over words: of a pass, and of one that looks for a place
    count = [part for part in parts[: search - 1] if part.depth == 3 and part.loop][-1]
    write, write_tied = (
        next(part for part in parts[at + 1 :] if part.depth == 3 and part.loop)
        for at in (search, ties)
    )
    once = sum(part.bundles for part in parts if part.depth == 2)

    def of_rows(rows: int, words_each: float, passes: float, tied: bool) -> float:
        def loops(at: int, times: float) -> float:
            return times * (
                parts[at - 1].bundles + words_each * parts[at].bundles + parts[at + 1].bundles
            )

        ends = words_each * (count.bundles + (write_tied if tied else write).bundles)
        return (
            rows
            / ROWS
            * (once + ends + loops(search, passes) + (loops(ties, position_bits(L)) if tied else 0))
        )

    tiles, flops = causal_tiles(L, queries, keys), 2 * queries * keys * I * C
    mean_words = statistics.mean(-(-(first + queries) // KEYS) for first in range(0, L, queries))
    bytes_ = tiles * keys * 2 * C + L * (I * 2 * C + 4 * stored(I + 1) + 4 * words(L))
    passes = {
        row["scores"]: row for row in json.loads(PASSES.read_text())["rows"] if row["length"] == L
    }
    searched = of_rows(L, mean_words, passes["weighted"]["mean"], tied=False)
    full_rows = {
        scores: {
            which: round(of_rows(TOP_K_ROWS, L / KEYS, row[which], row["tied"]) / rate * 1e3, 3)
            for which in ("mean", "most")
        }
        for scores, row in passes.items()
    }
    figures = tile_figures(
        "select", flops, tile.bundles, tile.spills, flops / tile.bundles / peak
    ) | {"length": L, "queries": queries, "keys": keys}
    return figures | {
        "scoring_mcycles": round(tiles * tile.bundles / 1e6, 1),
        "search_mcycles": round(searched / 1e6, 1),
        "whole": totals(tiles * tile.bundles + searched, tiles * flops, bytes_),
        "search_1024_full_rows_ms": full_rows,
    }


def compile_for(device, program):
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(np.array([device]), ("one",))
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
        for shape, dtype in program.shapes
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(program.function).lower(*arguments).compile()


def top_k_estimates(topology: str) -> dict[int, dict]:
    """Of XLA's top_k of 1024 rows, which sorts them: its temporary bytes, and what XLA's cost
    model, which is not a schedule, says of its time.
    """
    from bench.kernel_programs import top_k_program
    from plan.topology import topology_devices

    device, found = topology_devices(topology)[0], {}
    for L in LENGTHS:
        program = compile_for(device, top_k_program(TOP_K_ROWS, L))
        estimate, temporary = (
            program.cost_analysis()["optimal_seconds"],
            program.memory_analysis().temp_size_in_bytes,
        )
        # Of what fits on the chip it may say less than nothing.
        found[L] = {
            "rows": TOP_K_ROWS,
            "xla_cost_model_ms": round(estimate * 1e3, 3) if estimate > 0 else None,
            "temp_mbytes": round(temporary / 1e6),
        }
    return found


def timed(L: int, *, heads: int = 0, interpret: bool = False, repeats: int = 10) -> dict:
    """Median milliseconds of so many calls, on this process's first device, ours and what a JAX
    user has. Interpreted, they say nothing of the kernels.
    """
    import jax

    from bench import kernel_programs as programs
    from bench.workload import seconds

    device = jax.devices()[0]
    if device.platform != "tpu" and not interpret:
        raise UserError(
            f"these kernels are for TPU, and this is {device.device_kind}: --topology=v6e:2x2 compiles them without one"
        )
    heads, topk = heads or programs.HEADS, min(programs.TOPK, L // 4)

    def milliseconds(function, arguments) -> float | str:
        try:
            return round(
                statistics.median(seconds(lambda _: function(*arguments), repeats)) * 1e3, 3
            )
        except jax.errors.JaxRuntimeError as error:  # splash's mask has a byte a pair
            return str(error).splitlines()[0][:200]

    ours, bits = {}, None
    for name, program in programs.programs(L, heads=heads, topk=topk, interpret=interpret).items():
        function, arguments = jax.jit(program.function), drawn(program)
        if bits is not None:
            arguments[-1] = bits
        ours[name] = milliseconds(function, arguments)
        if name == "select":
            bits = function(*arguments)[0]
    rivals = {
        f"top_k, {min(TOP_K_ROWS, L)} rows": programs.top_k_program(min(TOP_K_ROWS, L), L, topk),
        "splash attention and gradients, dynamic mask": programs.splash_program(
            L, causal=False, heads=heads, interpret=interpret
        ),
        "splash attention and gradients, causal": programs.splash_program(
            L, causal=True, heads=heads, interpret=interpret
        ),
    }
    theirs = {
        name: milliseconds(jax.jit(program.function), drawn(program))
        for name, program in rivals.items()
    }
    return {
        "static": False,
        "device": device.device_kind,
        "length": L,
        "interpreted": interpret,
        "median_ms": ours,
        "rivals_median_ms": theirs,
    }


def drawn(program) -> list:
    """Its arguments: one segment, a mask of the keys before each query, and all else at random."""
    import jax
    import jax.numpy as jnp

    def one(at: int, shape: tuple[int, ...], dtype):
        if dtype == jnp.int32:
            return jnp.ones(shape, dtype)
        if dtype == jnp.bool_:
            return jnp.tril(jnp.ones(shape, dtype))
        return (
            jax.random.normal(jax.random.fold_in(jax.random.key(0), at), shape, dtype)
            * shape[-1] ** -0.25
        )

    return [one(at, *argument) for at, argument in enumerate(program.shapes)]


if __name__ == "__main__":
    flags = {
        "topology": Flag(
            "", "v5e:2x2, v5p:2x2x1, v6e:2x2 or tpu7x:2x2x1: compile for it, and run nothing"
        ),
        "length": Flag(8_192, "of the sequence that is timed on a TPU"),
    }
    command(run, config="none", workdir=False, flags=flags)
