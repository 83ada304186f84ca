"""Measures the TPU kernels and what a JAX user has in their place, at DeepSeek-V3.2's widths.

    .venv-compile/bin/python -m bench.kernels --topology=v6e:2x2     compiles, and runs nothing
    python -m bench.kernels                                          on a TPU: takes times

`make test-compile` makes the environment of the first line. The workload is one causal sequence,
16 heads of a device and 2048 keys for each query.

With a topology nothing is run, so nothing is measured: cycles are those of the compiler's static
schedule, if nothing stalls. A kernel's time is the longer of that of its cycles and that of its
bytes at the data sheet's bandwidth; its bound is the longer of that of its arithmetic at peak and
that of its bytes. How often a selection passes over a row is counted by bench.passes. For XLA's
top_k, a sort, there is XLA's cost model, which is not a schedule. One JSON line.
"""

import contextlib
import json
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.schedule import code_blocks, dump_schedules
from bench.selection_schedule import TOP_K_ROWS, selection_figures, tile_figures
from errors import UserError
from experiment.command_line import Flag, command

if TYPE_CHECKING:  # at run time JAX may only be imported inside `dump_schedules`
    from bench.kernel_programs import Program, Work

# The clock of the matrix units, and how many cores share a device's work: with them the cycles that
# a product takes in every kernel's schedule come to the peak on the data sheet. v5e and v5p (a core
# of it) take 131072 operations a cycle, v6e and TPU7x 524288.
CLOCK = {"v5e": (1.5e9, 1), "v5p": (1.75e9, 2), "v6e": (1.75e9, 1), "tpu7x": (2.2e9, 1)}
LENGTHS = (8_192, 32_768, 131_072)


def run(topology: str, length: int) -> None:
    """Prints the static figures of a topology, or the times on this machine's TPU."""
    found = timed(length) if not topology else static(topology)
    print(json.dumps({"bench": "kernels", "jax": version("jax")} | found))


class Device(NamedTuple):
    """Holds the peak rates of a device, by its data sheet."""

    clock: float  # cycles a second
    cores: int
    flops: float  # a second, all cores
    bandwidth: float  # bytes a second

    @property
    def flops_per_cycle(self) -> float:
        """The peak of one core."""
        return self.flops / self.cores / self.clock

    def totals(self, cycles: float, flops: float, bytes_: float, used: int = 0) -> dict:
        """Returns the figures of some work; `used`: cores that it runs on, 0 for all."""
        moved = bytes_ / self.bandwidth
        taken = max(cycles / (used or self.cores) / self.clock, moved)
        bound = max(flops / self.flops, moved)
        figures = {
            "mcycles": cycles / 1e6,
            "gbytes": bytes_ / 1e9,
            "bound_ms": bound * 1e3,
            "static_ms": taken * 1e3,
            "of_bound": bound / taken,
        }
        return {name: float(f"{figure:.4g}") for name, figure in figures.items()}


class Compiler(NamedTuple):
    """Compiles programs for a device that need not be present, and reads their schedules."""

    directory: Path  # where the compiler writes them, see `dump_schedules`
    device: Any

    def compile(self, program: "Program") -> None:
        """Compiles a program; afterwards the directory has its schedules alone."""
        for file in self.directory.glob("*.txt"):
            file.unlink()
        compile_for(self.device, program)


def static(topology: str) -> dict:
    """Compiles every kernel and its rival for a device of a topology; runs nothing.

    Raises UserError for a topology whose clock is not in the table.
    """
    kind = topology.partition(":")[0]
    if kind not in CLOCK:
        raise UserError(
            f"--topology={topology}: must be of {', '.join(CLOCK)}, whose clocks are known here"
        )
    with contextlib.ExitStack() as stack:
        # Another process compiles the sorts: it writes no schedules, and a sort's are long.
        sort_process = stack.enter_context(
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        )
        top_k = sort_process.submit(top_k_estimates, topology)
        directory = stack.enter_context(dump_schedules())  # before JAX is imported
        from plan.topology import CHIPS, topology_devices

        compiler = Compiler(directory, topology_devices(topology)[0])
        chip, (clock, cores) = CHIPS[compiler.device.device_kind], CLOCK[kind]
        device = Device(clock, cores, chip.flops, chip.hbm_bandwidth)
        kernels = kernel_rows(compiler, device)
        rivals = rival_rows(compiler, device)
        selection = selection_rows(compiler, device)
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


def kernel_rows(compiler: Compiler, device: Device) -> list[dict]:
    """Returns the figures of attention's kernels and of those of the indexer's loss."""
    from bench import kernel_programs as programs

    compiler.compile(programs.programs(LENGTHS[0])["attention and gradients"])
    rows = [
        row_of(compiler, device, [programs.works(L)[index] for L in LENGTHS]) for index in (0, 1)
    ]
    # The normaliser is the same with all heads.
    for heads, indices in ((programs.HEADS, (0, 1)), (programs.ALL_HEADS, (1,))):
        compiler.compile(programs.programs(LENGTHS[0], heads=heads)["indexer's loss and gradients"])
        for index in indices:
            kind = compiler.device.device_kind
            works = [programs.loss_works(L, heads, kind)[index] for L in LENGTHS]
            rows.append(row_of(compiler, device, works, heads=heads))
    return rows


def rival_rows(compiler: Compiler, device: Device) -> list[dict]:
    """Returns the figures of splash attention's kernels."""
    from bench import kernel_programs as programs

    rows = []
    for causal, name in (
        (False, "splash attention, dynamic mask"),
        (True, "splash attention, causal: dense flash"),
    ):
        compiler.compile(programs.splash_program(LENGTHS[0], causal=causal))
        for index in range(3):
            works = [programs.splash_works(L, causal=causal)[index] for L in LENGTHS]
            rows.append(row_of(compiler, device, works, of=name))
    return rows


def selection_rows(compiler: Compiler, device: Device) -> list[dict]:
    """Returns the figures of the selection of every length."""
    from bench import kernel_programs as programs
    from kernels.selection import most_queries

    schedules, rows = {}, []  # by the queries of a block, fewer where rows are longer
    for L in LENGTHS:
        queries = most_queries(L)
        if queries not in schedules:
            compiler.compile(programs.programs(L)["select"])
            schedules[queries] = code_blocks(compiler.directory, "select")
        cycles_per_second = device.cores * device.clock
        rows.append(
            selection_figures(
                schedules[queries], L, device.totals, cycles_per_second, device.flops_per_cycle
            )
        )
    return rows


def row_of(compiler: Compiler, device: Device, works: Sequence["Work"], **named: Any) -> dict:
    """Returns the figures of the kernel compiled last.

    Args:
      compiler: has its schedule.
      device: what it would run on.
      works: what it does for a sequence of each of LENGTHS.
      named: further entries of the row, which come first.
    """
    first = works[0]
    blocks = code_blocks(compiler.directory, first.kernel, jumps=len(first.runs) > 1)
    by_length = sorted(range(len(blocks)), key=lambda index: -blocks[index].bundles)
    longest = sorted(by_length[: len(first.runs)])
    tile = [(runs, blocks[index]) for runs, index in zip(first.runs, longest, strict=True)]
    tile_cycles = sum(runs * block.bundles for runs, block in tile)
    spills = sum(runs * block.spills for runs, block in tile)
    rest = sum(block.bundles for index, block in enumerate(blocks) if index not in longest)
    lengths = {
        L: device.totals(
            work.tiles * tile_cycles + work.rows * rest,
            work.tiles * work.flops,
            work.tiles * work.tile_bytes + work.rows * work.row_bytes,
            work.cores,
        )
        for L, work in zip(LENGTHS, works, strict=True)
    }
    fraction_of_peak = first.flops / tile_cycles / device.flops_per_cycle
    figures = tile_figures(first.kernel, first.flops, tile_cycles, spills, fraction_of_peak)
    return named | figures | {"lengths": lengths}


def compile_for(device: Any, program: "Program") -> Any:
    """Compiles a program for a device, which need not be present."""
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
    """Estimates XLA's top_k of 1024 rows, which sorts them, for each length.

    Returns its temporary bytes, and what XLA's cost model, which is not a schedule, says of its
    time: None where that is negative, as where the scores fit on the chip.
    """
    from bench.kernel_programs import top_k_program
    from plan.topology import topology_devices

    device, found = topology_devices(topology)[0], {}
    for L in LENGTHS:
        program = compile_for(device, top_k_program(TOP_K_ROWS, L))
        estimate = program.cost_analysis()["optimal_seconds"]
        found[L] = {
            "rows": TOP_K_ROWS,
            "xla_cost_model_ms": round(estimate * 1e3, 3) if estimate > 0 else None,
            "temp_mbytes": round(program.memory_analysis().temp_size_in_bytes / 1e6),
        }
    return found


def timed(L: int, *, heads: int = 0, interpret: bool = False, repeats: int = 10) -> dict:
    """Times the kernels, and what a JAX user has, on this process's first device.

    Args:
      L: tokens.
      heads: of attention; 0 for those of a device.
      interpret: runs them without a TPU; then the times say nothing of the kernels.
      repeats: calls whose median is taken.

    Raises UserError where there is no TPU.
    """
    import jax

    from bench import kernel_programs as programs
    from bench.workload import seconds

    device = jax.devices()[0]
    if device.platform != "tpu" and not interpret:
        raise UserError(
            f"these kernels are for TPU, and this is {device.device_kind}: "
            "--topology=v6e:2x2 compiles them without one"
        )
    heads, topk = heads or programs.HEADS, min(programs.TOPK, L // 4)

    def milliseconds(function: Callable, arguments: list) -> float | str:
        try:
            times = seconds(lambda _: function(*arguments), repeats)
        except jax.errors.JaxRuntimeError as error:  # splash's mask has a byte for each pair
            return str(error).splitlines()[0][:200]
        return round(statistics.median(times) * 1e3, 3)

    ours, bits = {}, None
    for name, program in programs.programs(L, heads=heads, topk=topk, interpret=interpret).items():
        function, arguments = jax.jit(program.function), random_arguments(program)
        if bits is not None:
            arguments[-1] = bits
        ours[name] = milliseconds(function, arguments)
        if name == "select":
            bits = function(*arguments)[0]
    rows, options = min(TOP_K_ROWS, L), {"heads": heads, "interpret": interpret}
    splash = "splash attention and gradients"
    rivals = {
        f"top_k, {rows} rows": programs.top_k_program(rows, L, topk),
        f"{splash}, dynamic mask": programs.splash_program(L, causal=False, **options),
        f"{splash}, causal": programs.splash_program(L, causal=True, **options),
    }
    theirs = {
        name: milliseconds(jax.jit(program.function), random_arguments(program))
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


def random_arguments(program: "Program") -> list:
    """Draws a program's arguments: one segment, a causal mask, and all else at random."""
    import jax
    import jax.numpy as jnp

    def one(index: int, shape: tuple[int, ...], dtype):
        if dtype == jnp.int32:
            return jnp.ones(shape, dtype)
        if dtype == jnp.bool_:
            return jnp.tril(jnp.ones(shape, dtype))
        key = jax.random.fold_in(jax.random.key(0), index)
        return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.25

    return [one(index, *argument) for index, argument in enumerate(program.shapes)]


if __name__ == "__main__":
    flags = {
        "topology": Flag(
            "", "v5e:2x2, v5p:2x2x1, v6e:2x2 or tpu7x:2x2x1: compile for it, and run nothing"
        ),
        "length": Flag(8_192, "of the sequence that is timed on a TPU"),
    }
    command(run, config="none", workdir=False, flags=flags)
