"""The flags with which XLA compiles the tests' programs, in this process and in those they start.

Tests compile more than they compute, so LLVM does not optimise, and XLA emits its fusions the way
that compiles in less than half the time (jax 0.11 and later have that way no more).
"""

import importlib.metadata

COMPILE_FLAGS = "--xla_backend_optimization_level=0"
if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11):
    COMPILE_FLAGS += " --xla_cpu_use_fusion_emitters=false"
