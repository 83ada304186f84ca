"""What bench.drift prints: sampler and trainer of one set of weights, apart by rounding alone.

tests/rl/test_exactness.py has the property itself; these wait for `make test-all`.
"""

import dataclasses
import functools

import jax
import pytest

from bench import drift
from errors import UserError
from model.mesh import MeshConfig
from model.sharding import make_mesh

MESH = make_mesh(MeshConfig(data=1, fsdp=1, expert=1, tensor=1), jax.devices()[:1])


@functools.cache
def lines(dtype: str) -> dict[str, dict]:
    """Of two layers with experts and an indexer: what differs is seen within seconds."""
    with pytest.MonkeyPatch.context() as patch:
        small = dataclasses.replace(drift.SHAPES["dsa"], num_hidden_layers=2)
        patch.setitem(drift.SHAPES, "dsa", dataclasses.replace(small, first_k_dense_replace=0))
        patch.setattr(drift, "REPLAYS", {name: drift.REPLAYS[name] for name in ("none", "both")})
        return {line["replay"]: line for line in drift.drift(drift.Case("dsa", dtype), MESH)}


@pytest.mark.slow
def test_in_float32_only_rounding_is_between_them():
    assert lines("float32")["both"]["max"] < 1e-5


@pytest.mark.slow
def test_in_bfloat16_a_replay_takes_away_more_than_half_of_the_difference():
    """Where routes and selections do differ; the rest is of the size of the weights' rounding."""
    found = lines("bfloat16")
    assert max(found["none"]["jaccard"].values()) < 1
    assert found["both"]["mean"] < found["none"]["mean"] / 2
    assert found["both"]["mean"] < found["both"]["half_ulp_mean"]


def test_a_mesh_is_read_by_its_axes():
    assert drift.mesh_config("data=2,expert=4") == MeshConfig(data=2, fsdp=1, expert=4, tensor=1)
    with pytest.raises(UserError, match=r"--mesh=data=x: must be like"):
        drift.mesh_config("data=x")
