"""What the tests here share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from data.tokenizer_files import load_tokenizer
from rl.servers import server as server_module
from rl.trajectory import Trajectory
from tests.model_server import ModelServer
from tests.programs import shared_programs  # noqa: F401
from tests.rl.served import MESH, ROWS, SAMPLING, expected_by
from tests.tiny_checkpoint import MODEL, write_checkpoint, write_tokenizer
from train.restore import load_variables
from train.setup import Setup


@pytest.fixture(scope="session")
def served_origin(tmp_path_factory) -> Path:
    """A checkpoint of random numbers, with a tokenizer."""
    directory = write_checkpoint(tmp_path_factory.mktemp("served") / "model", eos_token_id=257)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def served_setup(served_origin) -> Setup:
    return Setup(MODEL, load_tokenizer(served_origin), MESH)


@pytest.fixture(scope="session")
def policy(served_origin) -> dict:
    """Other weights than the server begins with."""
    variables = load_variables(MODEL, MESH, f"hf:{served_origin}")
    return jax.tree.map(lambda x: x * 1.1, variables)


@pytest.fixture
def serve(served_origin, served_setup, monkeypatch) -> Iterator:
    """(api, **fields) -> a server that runs, and is asked again at once when it fails."""
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.01)
    running = []

    def serve(api: str = "vllm", **fields: Any) -> ModelServer:
        made = ModelServer(
            api, served_origin, MODEL, MESH, served_setup.tokenizer, SAMPLING, rows=ROWS, **fields
        )
        made.start()
        running.append(made)
        return made

    yield serve
    for made in running:
        if made.live:
            made.stop()


@pytest.fixture
def expected(served_origin) -> dict[tuple[int, int], Trajectory]:
    """What this process samples with the policy."""
    return expected_by(served_origin, 1.1, 1.0)
