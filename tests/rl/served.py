"""A server of a tiny model, and what this process samples in its place: shared by the tests."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from model.mesh import MeshConfig
from model.sharding import make_mesh
from rl.config import ReinforceConfig, SamplingConfig
from rl.engine import Engine
from rl.engines import AnyEngine
from rl.request import Prompt, keys_of
from rl.servers.connect import connect
from rl.servers.engine import ServerEngine
from rl.servers.server import Server
from rl.trajectory import Trajectory
from tests.model_server import ModelServer
from tests.tiny_checkpoint import MODEL
from train.restore import load_variables
from train.setup import Setup

MESH = make_mesh(MeshConfig(data=1, fsdp=1, expert=1, tensor=1), jax.devices()[:1])
SAMPLING = SamplingConfig(
    max_prompt_tokens=24, max_new_tokens=12, attention="dense", server_timeout=20.0
)
STOPS = tuple(range(60, 72))
ROWS = 4


def connected(
    served: ModelServer, setup: Setup, workdir: Path, sampling: SamplingConfig = SAMPLING, **changes
) -> Server:
    changes = {"server": served.url, "server_api": served.api} | changes
    sampling = dataclasses.replace(sampling, **changes)
    server = connect(setup, sampling, ReinforceConfig(), workdir, "checkpoint", corrects=True)
    assert server is not None
    return server


def engine_of(server: Server, sampling: SamplingConfig = SAMPLING, requests: int = 8):
    return ServerEngine(server, sampling, MODEL.vocab_size, requests=requests)


def prompts_of(count: int = 4, **changes: Any) -> list[Prompt]:
    keys = keys_of(0, range(count), 2)
    options = {"max_new_tokens": 12, "stops": STOPS} | changes
    return [
        Prompt(
            np.random.default_rng(n).integers(80, 250, 3 + 4 * n).tolist(),
            keys[n],
            group=n,
            **options,
        )
        for n in range(count)
    ]


def own_engine(sampling: SamplingConfig = SAMPLING) -> Engine:
    return Engine(MODEL, MESH, sampling, rows=ROWS, steps=3)


def sampled(engine: AnyEngine, prompts: list[Prompt]) -> dict[tuple[int, int], Trajectory]:
    return {(each.group, each.sample): each for each in engine.run(prompts)}


@functools.cache
def expected_by(origin: Path, scale: float, temperature: float) -> dict:
    own = own_engine(dataclasses.replace(SAMPLING, temperature=temperature))
    variables = load_variables(MODEL, MESH, f"hf:{origin}")
    own.load(jax.tree.map(lambda x: x * scale, variables), version=7)
    return sampled(own, prompts_of())


def assert_same(found: dict, expected: dict, atol: float = 0.0) -> None:
    """To the bit, but for log-probs by `atol`, where one read at once what the other sampled."""
    assert found.keys() == expected.keys()
    for number, each in expected.items():
        for name in ("tokens", "roles", "logprobs", "log_kept", "versions"):
            one, other = (getattr(x, f"{name}_T") for x in (found[number], each))
            within = atol if name == "logprobs" else 0.0
            np.testing.assert_allclose(one, other, rtol=0, atol=within, err_msg=name)
            assert one.dtype == other.dtype
        assert found[number].ended == each.ended
