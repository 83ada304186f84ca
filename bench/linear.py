"""Times a SwiGLU's forward and backward pass with `linear`, and with `@` on [B, T, D].

    python -m bench.linear

Both get the same inputs in one process, by turns; the figures are medians of 10.
"""

import functools
import json
import statistics
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp

from experiment.command_line import command
from model.experts.swiglu import swiglu
from model.layers.linear import linear

B, T, D, F = 8, 256, 256, 704  # the dense FFN of tiny-dsv3
REPEATS = 10


@functools.partial(jax.jit, static_argnums=0)
def gradients(product, x_BTD, weights, dy_BTD):
    """Computes the gradients of a SwiGLU to its input and its three weights.

    Args:
      product: (x, w) -> x w.
      x_BTD: the input.
      weights: gate_DF, up_DF, down_FD.
      dy_BTD: the gradient to the output.
    """

    def ffn(x, gate, up, down):
        return product(swiglu(product(x, gate), product(x, up)), down)

    _, pull = jax.vjp(ffn, x_BTD, *weights)
    return pull(dy_BTD)


def main() -> None:
    """Times both and prints one JSON line."""
    keys = jax.random.split(jax.random.key(0), 5)
    x_BTD, dy_BTD = (jax.random.normal(key, (B, T, D)) for key in keys[:2])
    weights = [
        jax.random.normal(key, shape) * shape[0] ** -0.5
        for key, shape in zip(keys[2:], ((D, F), (D, F), (F, D)), strict=True)
    ]
    rivals = {"linear": linear, "matmul": jnp.matmul}
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for repeat in range(-2, REPEATS):
        for name, product in rivals.items():
            began = time.perf_counter()
            jax.block_until_ready(gradients(product, x_BTD, weights, dy_BTD))
            if repeat >= 0:
                times[name].append(time.perf_counter() - began)
    medians = {
        f"{name}_ms": round(statistics.median(taken) * 1e3, 2) for name, taken in times.items()
    }
    ratio = round(medians["matmul_ms"] / medians["linear_ms"], 2)
    about = {"device": jax.devices()[0].device_kind, "jax": version("jax")}
    print(json.dumps({"bench": "linear", "shape": [B, T, D, F], "ratio": ratio} | medians | about))


if __name__ == "__main__":
    command(main, config="none", workdir=False)
