"""A checkpoint comes back bit by bit, on any mesh, with its place in the data; or says in one line
why not.
"""

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoints.restore import restore_parameters
from checkpoints.training import Checkpoints
from errors import UserError


@flax.struct.dataclass
class State:
    step: jax.Array
    params: Any
    router: Any
    opt_state: Any
    key: jax.Array


def make_state(width: int = 8, seed: int = 0, **extra) -> State:
    """Every kind of leaf a training state has; random, so that no compression hides a size."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "embed": jax.random.normal(keys[0], (16, width)),
        "blocks": {"w": jax.random.normal(keys[1], (2, width, 8)).astype(jnp.bfloat16)},
    } | extra
    router = {"bias": jnp.array([jnp.nan, -0.0, 1e-40, jnp.inf])}  # values a careless copy changes
    return State(
        jnp.int32(7), params, router, optax.adam(1e-3).init(params), jax.random.key_data(keys[2])
    )


def sharded(state: State, mesh_shape: tuple[int, int]) -> State:
    """The abstract state, embed and w cut along both axes of a mesh."""
    mesh = jax.make_mesh(
        mesh_shape,
        ("fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: mesh_shape[0] * mesh_shape[1]],
    )
    specs = {16: P("fsdp", "tensor"), 2: P(None, "fsdp", "tensor")}

    def place(leaf):
        return jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=NamedSharding(mesh, specs[leaf.shape[0]] if leaf.ndim > 1 else P()),
        )

    return jax.tree.map(place, state)


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def numbers():
    return iter(grain.MapDataset.range(100).shuffle(seed=3).to_iter_dataset())


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        yield checkpoints


def test_restores_every_bit_on_another_mesh(checkpoints):
    state = make_state()
    placed = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, sharded(state, (4, 2)))
    checkpoints.save(100, placed)
    wanted = sharded(state, (2, 1))
    restored = checkpoints.restore(wanted)
    assert_identical(restored, state)
    assert all(
        a.sharding == b.sharding
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True)
    )


def test_restores_without_shardings(checkpoints):
    state = make_state()
    checkpoints.save(
        1, jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, sharded(state, (4, 2)))
    )
    assert_identical(checkpoints.restore(jax.eval_shape(make_state)), state)


@pytest.mark.parametrize(
    "spec", [P(), P("fsdp"), P("fsdp", "tensor")], ids=["replicated", "half", "sharded"]
)
def test_buffers_may_be_donated_right_after_save(checkpoints, spec):
    """16 MB take far longer to write than the donating step takes to overwrite them."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    state = {
        "w": jax.device_put(
            jax.random.normal(jax.random.key(0), (2048, 2048)), NamedSharding(mesh, spec)
        )
    }
    expected = np.array(state["w"])
    clear = jax.jit(lambda x: jax.tree.map(lambda w: w * 0, x), donate_argnums=0)
    clear = clear.lower(state).compile()
    checkpoints.save(1, state)
    state = clear(state)
    np.testing.assert_array_equal(checkpoints.restore(jax.eval_shape(lambda: state))["w"], expected)


def test_saving_compiles_nothing(checkpoints):
    """Orbax by default has every replica write a slice of every array: hundreds of little
    compilations, while training waits.
    """
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    state = jax.block_until_ready(jax.device_put(make_state(width=72), NamedSharding(mesh, P())))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        checkpoints.save(1, state)
        checkpoints.wait()
        assert compiled == []
        jax.jit(lambda x: x * 3 + 5)(jnp.ones(17))
        assert compiled  # so the listener hears
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_cursor_is_taken_when_save_is_called(checkpoints):
    data = numbers()
    seen = [next(data) for _ in range(5)]
    checkpoints.save(5, {"w": jnp.zeros(3)}, data)
    following = [next(data) for _ in range(10)]
    again = numbers()
    checkpoints.restore({"w": jnp.zeros(3)}, again)
    assert [next(again) for _ in range(10)] == following
    assert seen != following[:5]


def test_cursor_of_bytes(checkpoints):
    """grain.DataLoader's iterators keep theirs as bytes."""

    def loader():
        sampler = grain.samplers.IndexSampler(
            50, grain.sharding.NoSharding(), shuffle=True, num_epochs=1, seed=1
        )
        # Grain names the argument of __getitem__ `index`; neither range nor its own sources do.
        return iter(
            grain.DataLoader(
                data_source=range(50),  # pyright: ignore[reportArgumentType]
                sampler=sampler,
            )
        )

    data = loader()
    next(data)
    checkpoints.save(1, {"w": jnp.zeros(3)}, data)
    following, again = next(data), loader()
    checkpoints.restore({"w": jnp.zeros(3)}, again)
    assert next(again) == following


def test_keeps_the_newest_and_restores_an_older(checkpoints):
    for step in (1, 2, 3):
        checkpoints.save(step, {"w": jnp.full(3, step)})
    assert checkpoints.latest() == 3
    assert sorted(int(p.name) for p in checkpoints.directory.iterdir()) == [2, 3]
    assert checkpoints.restore({"w": jnp.zeros(3, int)}, step=2)["w"][0] == 2
    with pytest.raises(UserError, match="checkpoints/1: no checkpoint there"):
        checkpoints.restore({"w": jnp.zeros(3, int)}, step=1)


def test_saving_the_same_step_again(tmp_path):
    """Within a run it is the last step, saved twice by a plain loop. From another run it would hide
    what is there.
    """
    with Checkpoints(tmp_path, keep=2) as first:
        first.save(1, {"w": jnp.zeros(3)})
        first.save(1, {"w": jnp.zeros(3)})
    with (
        Checkpoints(tmp_path, keep=2) as second,
        pytest.raises(UserError, match="1: there already"),
    ):
        second.save(1, {"w": jnp.zeros(3)})


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (
            make_state(width=4),
            "params/blocks/w is [2,8,8] there, [2,4,8] in this config (and 5 more)",
        ),
        (
            make_state(gate=jnp.zeros((3, 5))),
            "params/gate is not there, [3,5] in this config (and 2 more)",
        ),
        (
            dataclasses.replace(make_state(), router={}),
            "router/bias is [4] there, not in this config",
        ),
        (
            dataclasses.replace(make_state(), router={"bias": jnp.zeros(4, jnp.bfloat16)}),
            "router/bias is float32 there, bfloat16 in this config",
        ),
    ],
    ids=["shape", "missing", "extra", "dtype"],
)
def test_what_does_not_fit_is_named(checkpoints, other, line):
    checkpoints.save(100, make_state())
    with pytest.raises(UserError) as error:
        checkpoints.restore(other)
    assert str(error.value) == f"{checkpoints.directory}/100: {line}"


def test_restores_parameters_alone(checkpoints):
    """From the workdir, its checkpoints, or one of them, whatever else the state has."""
    state = make_state()
    checkpoints.save(1, make_state(seed=1))
    checkpoints.save(2, state)
    checkpoints.wait()
    abstract = sharded(state, (2, 2))
    wanted = {"params": abstract.params, "router": abstract.router}
    for path in (checkpoints.directory.parent, checkpoints.directory, checkpoints.directory / "2"):
        restored = restore_parameters(path, wanted)
        assert_identical(restored, {"params": state.params, "router": state.router})
    assert restored["params"]["embed"].sharding == abstract.params["embed"].sharding
    older = restore_parameters(checkpoints.directory / "1", wanted)
    assert_identical(older["params"], make_state(seed=1).params)


def test_parameters_that_do_not_fit_are_named(checkpoints):
    checkpoints.save(1, make_state())
    checkpoints.wait()
    with pytest.raises(
        UserError,
        match=r"checkpoints/1: params/blocks/w is \[2,8,8\] there, \[2,4,8\] in this config"
        r" \(and 1 more\)",
    ):
        restore_parameters(checkpoints.directory.parent, {"params": make_state(width=4).params})


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match="file/checkpoints: cannot keep checkpoints there: Not a directory"
    ):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1)


@pytest.mark.parametrize("make", ["nothing", "empty", "empty checkpoints"])
def test_no_checkpoint(tmp_path, make):
    workdir = tmp_path / "x"
    if make != "nothing":
        (workdir / "checkpoints" if make == "empty checkpoints" else workdir).mkdir(parents=True)
    with pytest.raises(UserError) as error:
        restore_parameters(workdir, {"params": jnp.zeros(3)})
    assert str(error.value) == f"{workdir}: no checkpoint there"


def test_another_number_of_processes(checkpoints):
    checkpoints.save(1, {"w": jnp.zeros(3)}, numbers())
    checkpoints.wait()
    file = next((checkpoints.directory / "1" / "cursor").glob("*.json"))
    file.rename(file.parent / "process_0-of-4.json")
    with pytest.raises(UserError, match="checkpoints/1: saved by 4 processes, this run has 1"):
        checkpoints.restore({"w": jnp.zeros(3)}, numbers())


@pytest.fixture
def small_files():
    """No file may grow beyond 100 kB: writes fail halfway, for root too."""
    handler, limit = (
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)


def test_failed_write_keeps_the_last_good_checkpoint(checkpoints, small_files, caplog):
    lift_limit = small_files
    checkpoints.save(1, {"w": jnp.ones(3)}, numbers())
    checkpoints.wait()
    checkpoints.save(2, {"w": jax.random.normal(jax.random.key(0), (512, 512))}, numbers())
    with pytest.raises(UserError) as error:
        checkpoints.wait()
    reason = "File too large (the newest good checkpoint is step 1)"
    assert str(error.value) == f"{checkpoints.directory}: cannot write a checkpoint: {reason}"
    assert [p.name for p in checkpoints.directory.iterdir()] == ["1"]
    assert checkpoints.latest() == 1
    np.testing.assert_array_equal(
        checkpoints.restore({"w": jnp.zeros(3)}, numbers())["w"], np.ones(3)
    )
    lift_limit()
    checkpoints.save(2, {"w": jnp.full(3, 2.0)})  # and the step can be saved after all
    assert checkpoints.latest() == 2
    # One error is reported once.
    assert [record for record in caplog.records if "orbax" in record.pathname] == []


def test_failure_reaches_the_next_save_and_close(tmp_path, small_files):
    big = {"w": jax.random.normal(jax.random.key(0), (512, 512))}
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, big)
    with pytest.raises(UserError, match="no checkpoint is there"):
        checkpoints.save(2, big)
    checkpoints.save(2, big)
    with pytest.raises(UserError, match="File too large"):
        checkpoints.close()


def test_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with Checkpoints(disk, keep=2) as checkpoints:
            checkpoints.save(1, {"w": jnp.ones(3)})
            checkpoints.save(2, {"w": jax.random.normal(jax.random.key(0), (512, 512))})
            with pytest.raises(
                UserError,
                match=r"disk: cannot write a checkpoint: No space left on device"
                r" \(the newest good checkpoint is step 1\)",
            ):
                checkpoints.wait()
            checkpoints.save(3, {"w": jnp.ones(3)})
            assert checkpoints.latest() == 3
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.command
def test_killed_while_saving_leaves_nothing_to_see(tmp_path):
    """A process dies before the last file is renamed; the next run neither sees nor keeps the
    rest.
    """
    words = ["-m", "tests.checkpoints.processes", "killed_before_the_last_rename", str(tmp_path)]
    killed = subprocess.run([sys.executable, *words], cwd=Path(__file__).parents[2])
    assert killed.returncode == 9
    assert any("tmp" in p.name for p in tmp_path.iterdir())
    assert_identical(restore_parameters(tmp_path, {"w": jnp.zeros(3)}), {"w": jnp.ones(3)})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(3, {"w": jnp.ones(3)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]


def test_a_directory_deleted_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """One line, and the directory is not made again."""
    directory, write = tmp_path / "checkpoints", Checkpoints._write_checksums

    def write_after_deletion(self):
        shutil.rmtree(directory)
        write(self)

    with Checkpoints(directory, keep=2) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(3)})
        checkpoints.wait()
    monkeypatch.setattr(Checkpoints, "_write_checksums", write_after_deletion)
    with Checkpoints(directory, keep=2) as checkpoints:
        checkpoints.save(2, {"w": jnp.zeros(3)})
        with pytest.raises(
            UserError, match=r"its files were deleted meanwhile \(no checkpoint is there\)"
        ):
            checkpoints.wait()
        with pytest.raises(UserError, match="cannot write a checkpoint: No such file"):
            checkpoints.save(3, {"w": jnp.zeros(3)})
    assert not directory.exists()
