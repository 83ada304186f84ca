"""A run that is asked to stop ends well; processes agree on the step."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import free_address
from train.interrupt import Interrupt

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_asks_and_second_does_what_it_did(number):
    before = signal.signal(number, lambda *_: (_ for _ in ()).throw(InterruptedError))
    try:
        with Interrupt() as interrupt:
            with pytest.raises(InterruptedError):  # there is nothing to save yet
                signal.raise_signal(number)
            assert not interrupt.stop_requested(1)
            signal.raise_signal(number)
            assert interrupt.stop_requested(1)
            with pytest.raises(InterruptedError):
                signal.raise_signal(number)
        with pytest.raises(InterruptedError):
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)


TRAINER = """
import sys, time, jax, jax.numpy as jnp
from pathlib import Path
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import grain
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from checkpoints.training import Checkpoints
from train.interrupt import Interrupt
mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
here = NamedSharding(mesh, P("fsdp"))
state = {"w": jax.device_put(jnp.arange(8.0), here)}
start = jax.process_index() * 1000
data = iter(grain.MapDataset.range(start, start + 999).to_iter_dataset())
add = jax.jit(lambda state, x: {"w": state["w"] + 1}, donate_argnums=0)
with Checkpoints(Path(sys.argv[3]), keep=1) as checkpoints, Interrupt() as interrupt:
    first = checkpoints.latest() or 0
    if first:
        abstract = {"w": jax.ShapeDtypeStruct((8,), "float32", sharding=here)}
        state = checkpoints.restore(abstract, data)
    for step in range(first + 1, 500):
        state = add(state, next(data))
        time.sleep(0.05)
        if step == first + 5:
            print("running", flush=True)
        if interrupt.stop_requested(step):
            break
    checkpoints.save(step, state, data)
weight = float(state["w"].addressable_shards[0].data[0])
print("stopped after", first, step, weight, next(data), flush=True)
"""


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_go_on(tmp_path):
    """One of them gets the signal; then both are started anew and go on where they were, each in
    its own data.
    """
    ended = []
    for _ in range(2):
        environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", TRAINER, free_address()]
        processes = [
            subprocess.Popen(
                [*command, str(i), str(tmp_path)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        for process in processes:
            # The lines before it are gloo's.
            assert process.stdout is not None
            assert "running\n" in iter(process.stdout.readline, ""), process.communicate()
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=300) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        found = [re.findall("stopped after (.*)", out) for out, _ in outputs]
        ended.append([[float(number) for number in line.split()] for (line,) in found])
    for i, (first, second) in enumerate(zip(*ended, strict=True)):
        assert first[1] == ended[0][0][1]
        assert second[0] == first[1]
        for _, step, weight, following in (first, second):
            assert weight == 4 * i + step and following == 1000 * i + step
