"""What couples a step's or an update's tokens is the same on one device and on eight."""

import jax
import numpy as np
import pytest

from data.tokenizer import Tokenizer
from model.mesh import MeshConfig
from model.sharding import batch_sharding, make_mesh
from rl.algorithms.spec import get_algorithm
from rl.signals import jit_step_signals, jit_update_signals
from tests import tiny
from tests.rl.losses import batch_of, paid_of
from tests.rl.test_algorithms import EVERYTHING, T, inputs
from train.setup import Setup

pytestmark = pytest.mark.mesh

MESHES = {
    "one": MeshConfig(data=1, fsdp=1, expert=1, tensor=1),
    "eight": MeshConfig(data=2, fsdp=2, expert=2, tensor=1),
}
SPECS = (
    "ppo",
    "gtpo_conflict",
    "gtpo_entropy",
    "scale_rl",
    "deepseek_v32" + EVERYTHING,
    "gdpo?whiten=tokens",
    "clip_cov?cov_share=0.3&cov_low=0.01",
    "m2po",
)


def signals_on(name: str, spec: str) -> dict[str, np.ndarray]:
    devices = jax.devices()[: 1 if name == "one" else 8]
    mesh = make_mesh(MESHES[name], devices)
    setup = Setup(tiny.MODEL, Tokenizer.__new__(Tokenizer), mesh)
    algorithm = get_algorithm(spec, max_completion=T)
    batch = jax.device_put(batch_of(inputs()), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        found = jit_step_signals(setup, algorithm)(batch, paid_of(inputs()))
        if algorithm.selection is not None:
            current = {"current_logprobs": batch["logprobs"], "current_entropy": batch["entropy"]}
            given = batch | found | current
            found |= jit_update_signals(setup, algorithm)(given, jax.random.key(0))
    return {name: np.asarray(x) for name, x in found.items()}


@pytest.mark.parametrize("spec", SPECS)
def test_signals_do_not_depend_on_the_mesh(spec):
    """Sums in another order; what is masked or chosen is the same."""
    one, eight = (signals_on(name, spec) for name in MESHES)
    assert one.keys() == eight.keys() >= {"advantages", "mask"}
    for name, x in one.items():
        if x.dtype == bool:
            np.testing.assert_array_equal(eight[name], x, err_msg=name)
        else:
            np.testing.assert_allclose(eight[name], x, rtol=2e-5, atol=2e-6, err_msg=name)
