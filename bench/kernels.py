"""The TPU kernels and what a JAX user has in their place, at DeepSeek-V3.2's widths: 16 heads a device, 2048 keys a query, causal, one sequence.

    .venv-compile/bin/python -m bench.kernels --topology=v6e:2x2          (make test-compile makes that environment)
    python -m bench.kernels                                               on a TPU: times, too

Of a topology nothing is run, so nothing is measured: cycles are those of the compiler's static schedule, if nothing stalls. A kernel's time is the longer of
its cycles and of its bytes at the data sheet's bandwidth; its bound the longer of its arithmetic at peak and of its bytes. One JSON line.
"""

import contextlib
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version

from bench.schedule import Stretch, dumped, stretches
from errors import UserError
from launch.command import Flag, command

# Of the matrix units, and how many cores share a device's work: with them the cycles that a product takes in every kernel's schedule come to the peak on the
# data sheet. v5e and v5p (a core of it) take 131072 operations a cycle, v6e and TPU7x 524288.
CLOCK = {"v5e": (1.5e9, 1), "v5p": (1.75e9, 2), "v6e": (1.75e9, 1), "tpu7x": (2.2e9, 1)}
LENGTHS = (8_192, 32_768, 131_072)
PASSES = 12  # over a row, to find its threshold: tests/model/test_selection.py has that many as its limit
TOP_K_ROWS, TOP_K_LENGTHS = 1_024, LENGTHS[1:]  # of 8K the compiler estimates a negative time


def run(topology: str, length: int) -> None:
    found = timed(length) if not topology else static(topology)
    print(json.dumps({"bench": "kernels", "jax": version("jax")} | found))


def static(topology: str) -> dict:
    kind = topology.partition(":")[0]
    if kind not in CLOCK:
        raise UserError(f"--topology={topology}: must be of {', '.join(CLOCK)}, whose clocks are known here")
    with contextlib.ExitStack() as stack:
        aside = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        top_k = aside.submit(top_k_estimates, topology)  # in a process that writes no schedules, as a sort's are long
        directory = stack.enter_context(dumped())  # before JAX is imported
        from bench import kernel_programs as programs
        from launch.topology import CHIPS, topology_devices

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
            longest = sorted(sorted(range(len(parts)), key=lambda at: -parts[at].bundles)[: len(runs)])
            tile_cycles, spills = (sum(run * getattr(parts[at], of) for run, at in zip(runs, longest, strict=True)) for of in ("bundles", "spills"))
            rest = sum(part.bundles for at, part in enumerate(parts) if at not in longest)
            lengths = {}
            for L in LENGTHS:
                work = work_of(L)
                cycles, bytes_ = work.tiles * tile_cycles + work.rows * rest, work.tiles * work.tile_bytes + work.rows * work.row_bytes
                lengths[L] = totals(cycles, work.tiles * work.flops, bytes_, work.cores or cores)
            of_peak = work.flops / tile_cycles / (chip.flops / cores / clock)
            return named | tile_figures(work.kernel, work.flops, tile_cycles, spills, of_peak) | {"lengths": lengths}

        def totals(cycles: float, flops: float, bytes_: float, used: int = cores) -> dict:
            """`used`: cores that it runs on."""
            moved = bytes_ / chip.hbm_bandwidth
            taken, bound = max(cycles / used / clock, moved), max(flops / chip.flops, moved)
            figures = {"mcycles": cycles / 1e6, "gbytes": bytes_ / 1e9, "bound_ms": bound * 1e3, "static_ms": taken * 1e3, "of_bound": bound / taken}
            return {name: float(f"{figure:.4g}") for name, figure in figures.items()}

        kernels, selection = [], []
        compiled(programs.programs(LENGTHS[0])["attention and gradients"])
        kernels += [row(lambda L, at=at: programs.works(L)[at]) for at in (0, 1)]
        for heads, places in ((programs.HEADS, (0, 1)), (programs.ALL_HEADS, (1,))):  # the normaliser is the same
            compiled(programs.programs(LENGTHS[0], heads=heads)["indexer's loss and gradients"])
            kernels += [row(lambda L, at=at, heads=heads: programs.loss_works(L, heads, device.device_kind)[at], heads=heads) for at in places]
        rivals = []
        for causal, name in ((False, "splash attention, dynamic mask"), (True, "splash attention, causal: dense flash")):
            compiled(programs.splash_program(LENGTHS[0], causal=causal))
            rivals += [row(lambda L, at=at, causal=causal: programs.splash_works(L, causal=causal)[at], of=name) for at in range(3)]
        schedules = {}  # by the queries of a block, of which fewer fit beside longer rows
        for L in LENGTHS:
            queries = programs.select_queries(L)
            if queries not in schedules:
                compiled(programs.programs(L)["select"])
                schedules[queries] = stretches(directory, "select")
            selection.append(selection_figures(schedules[queries], L, programs, totals, cores * clock, chip.flops / cores / clock))
        estimates = top_k.result()
    for figures in selection:
        figures["top_k"] = estimates.get(figures["length"])
    return {"static": True, "topology": topology, "libtpu": version("libtpu"), "kernels": kernels, "selection": selection, "rivals": rivals}


def tile_figures(kernel: str, flops: float, cycles: int, spills: int, of_peak: float) -> dict:
    return {"kernel": kernel, "tile_gflop": round(flops / 1e9, 3), "tile_cycles": cycles, "of_peak": round(of_peak, 3), "spills": spills}


def selection_figures(parts: list[Stretch], L: int, programs, totals, rate: float, peak: float) -> dict:
    """Scoring, tile by tile, then eight rows at a time: a count, PASSES passes and the bits, each a loop over words of 4096 keys."""
    from model.kernels.keyset import KEYS, words
    from model.kernels.selection import ROWS

    I, C, queries, keys = programs.I, programs.C, programs.select_queries(L), 512
    tile = max(parts, key=lambda part: part.bundles)
    inner = next(at for at, part in enumerate(parts) if part.depth == 4 and part.loop)  # a pass's loop over words
    count = [part for part in parts[: inner - 1] if part.depth == 3 and part.loop][-1]
    write = next(part for part in parts[inner + 1 :] if part.depth == 3 and part.loop)
    once = sum(part.bundles for part in parts if part.depth == 2)
    a_word = count.bundles + write.bundles + PASSES * parts[inner].bundles
    a_group = once + PASSES * (parts[inner - 1].bundles + parts[inner + 1].bundles)

    def of_rows(rows: int, words_each: float) -> float:
        return rows / ROWS * (a_group + words_each * a_word)

    tiles, flops = programs.causal_tiles(L, queries, keys), 2 * queries * keys * I * C
    mean_words = statistics.mean(-(-(first + queries) // KEYS) for first in range(0, L, queries))
    bytes_ = tiles * keys * 2 * C + L * (I * 2 * C + 4 * programs.stored(I + 1) + 4 * words(L))
    figures = tile_figures("select", flops, tile.bundles, tile.spills, flops / tile.bundles / peak) | {"length": L}
    return figures | {
        "scoring_mcycles": round(tiles * tile.bundles / 1e6, 1),
        "search_mcycles": round(of_rows(L, mean_words) / 1e6, 1),
        "whole": totals(tiles * tile.bundles + of_rows(L, mean_words), tiles * flops, bytes_),
        "search_1024_full_rows_ms": round(of_rows(TOP_K_ROWS, L / KEYS) / rate * 1e3, 3),
    }


def compile_for(device, program):
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(np.array([device]), ("one",))
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P())) for shape, dtype in program.shapes]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(program.function).lower(*arguments).compile()


def top_k_estimates(topology: str) -> dict[int, dict]:
    """Of XLA's top_k of 1024 rows, which sorts them: the compiler's own estimate of its time, and its temporary bytes."""
    from bench.kernel_programs import top_k_program
    from launch.topology import topology_devices

    device, found = topology_devices(topology)[0], {}
    for L in TOP_K_LENGTHS:
        program = compile_for(device, top_k_program(TOP_K_ROWS, L))
        estimate, temporary = program.cost_analysis()["optimal_seconds"], program.memory_analysis().temp_size_in_bytes
        found[L] = {"rows": TOP_K_ROWS, "xla_estimate_ms": round(estimate * 1e3, 3), "temp_mbytes": round(temporary / 1e6)}
    return found


def timed(L: int, *, heads: int = 0, interpret: bool = False, repeats: int = 10) -> dict:
    """Median milliseconds of so many calls, on this process's first device. The interpreter's say nothing of the kernels."""
    import jax
    import jax.numpy as jnp

    from bench import kernel_programs as programs

    device = jax.devices()[0]
    if device.platform != "tpu" and not interpret:
        raise UserError(f"these kernels are for TPU, and this is {device.device_kind}: --topology=v6e:2x2 compiles them without one")
    made = programs.programs(L, heads=heads or programs.HEADS, topk=min(programs.TOPK, L // 4), interpret=interpret)
    key, milliseconds = jax.random.key(0), {}
    bits = None
    for name, program in made.items():
        arguments = [
            jnp.ones(shape, dtype) if dtype == jnp.int32 else jax.random.normal(jax.random.fold_in(key, at), shape, dtype) * shape[-1] ** -0.25
            for at, (shape, dtype) in enumerate(program.shapes)
        ]
        if bits is not None:
            arguments[-1] = bits
        function = jax.jit(program.function)
        taken = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            results = jax.block_until_ready(function(*arguments))
            taken.append(time.perf_counter() - began)
        if name == "select":
            bits = results[0]
        milliseconds[name] = round(statistics.median(taken[1:]) * 1e3, 3)  # the first call compiles
    return {"static": False, "device": device.device_kind, "length": L, "interpreted": interpret, "median_ms": milliseconds}


if __name__ == "__main__":
    flags = {
        "topology": Flag("", "v5e:2x2, v5p:2x2x1, v6e:2x2 or tpu7x:2x2x1: compile for it, and run nothing"),
        "length": Flag(8_192, "of the sequence that is timed on a TPU"),
    }
    command(run, config="none", workdir=False, flags=flags)
