"""The options that programs are compiled with."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from kernels.device import CPU_OPTIONS, compiler_options
from model.mesh import MeshConfig
from model.sharding import make_mesh

LEVEL = "xla_backend_optimization_level"


@pytest.fixture
def mesh(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    return make_mesh(MeshConfig())


def test_this_compiler_knows_the_options(mesh):
    options = compiler_options(mesh)
    assert options == CPU_OPTIONS and options[LEVEL] == 2
    assert compiler_options(mesh, runs_once=True)[LEVEL] == 0
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


def test_what_the_environment_sets_stays(mesh, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{LEVEL}=1")
    assert LEVEL not in compiler_options(mesh) | compiler_options(mesh, runs_once=True)


def test_other_compilers_need_none():
    tpu: Any = SimpleNamespace(devices=np.asarray([SimpleNamespace(platform="tpu")]))
    assert compiler_options(tpu) == {}
