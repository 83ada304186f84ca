"""Which matrices of a model have adapters (LoRA, arXiv 2106.09685), and how these begin.

    W + (alpha / r) A B      A is drawn as the authors' code and peft draw it, B begins at 0

so that a run begins as its base, to the bit; or both are read from peft's format. How a model reads
them is in model/adapters.py, and what a run keeps of its base in train/base.py.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from checkpoints.hf.peft import read_adapters
from errors import UserError
from model.adapters import adapter_boxes
from model.config import ModelConfig
from model.sharding import Named, is_named
from model.transformer import boxed_shapes
from train.config import TrainConfig
from train.optimizer import is_hidden_matrix, path_of, trainable

# Says of a matrix, by the names of its path and its box, whether it belongs to a group.
MODULES: dict[str, Callable[[list[str], Named], bool]] = {
    "attention": lambda names, _: "attention" in names and "indexer" not in names,
    "ffn": lambda names, _: names[-2] == "ffn",
    "experts": lambda _, box: "experts" in box.names,
    "shared_experts": lambda names, _: names[-2] == "shared" or names[-1] == "shared_gate",
    "router": lambda names, _: names[-2:] == ["moe", "router"],
    "indexer": lambda names, _: "indexer" in names,
    "mtp": lambda names, _: names[-1] == "merge",
}


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of a run.

    Attributes:
      rank: of each.
      scale: what the product of their factors is multiplied by.
      matrices: the paths of the adapted matrices, in the order of the model's parameters.
      begins_as: a directory in peft's format, whose adapters a new run begins with; "" for none.
    """

    rank: int
    scale: float
    matrices: tuple[str, ...]
    begins_as: str = dataclasses.field(default="", compare=False)

    def boxes(self, model: ModelConfig) -> dict[str, Any]:
        """Returns the shapes of {"params": adapters, "router"} in their boxes.

        Raises:
          UserError: the model has no such matrix.
        """
        boxed = boxed_shapes(model)
        found = _boxes_by_path(boxed["params"])
        tree: dict[str, Any] = {}
        for path in self.matrices:
            if path not in found:
                raise UserError(
                    f"{path}: has an adapter, and this config's model has no such matrix"
                )
            *parents, name = path.split("/")
            place = tree
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = adapter_boxes(found[path], self.rank)
        return {"params": tree, "router": boxed["router"]}

    def first(self, model: ModelConfig, key: Array) -> dict[str, Any]:
        """Draws adapters: A uniform within +- 1 / sqrt(inputs), B at 0."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(
            self.boxes(model)["params"], is_leaf=is_named
        )

        def draw(path: Any, box: Named, key: Array) -> Array:
            shape = box.value.shape
            if path[-1].key == "b":
                return jnp.zeros(shape, jnp.float32)
            bound = math.prod(shape[axis] for axis in box.matrix_axes[0]) ** -0.5
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        keys = jax.random.split(key, len(leaves))
        drawn = [draw(path, box, one) for (path, box), one in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(structure, drawn)

    def read(self, model: ModelConfig) -> dict[str, dict[str, np.ndarray]]:
        """Reads the adapters that a new run begins with; {} where it has none.

        Raises UserError as `read_adapters` does.
        """
        if not self.begins_as:
            return {}
        directory = Path(self.begins_as)
        return read_adapters(directory, model, self.matrices, self.rank, self.scale)


def begun_as(drawn: dict[str, Any], given: Mapping[str, Mapping[str, Array]]) -> dict[str, Any]:
    """Returns drawn adapters with those that were read in their place.

    Args:
      given: what `Lora.read` returns. Where a factor is not known, A stays as it was drawn, so that
        it can learn.
    """

    def put(adapter: Mapping[str, Array], read: Mapping[str, Array]) -> dict[str, Array]:
        *stacked, rank = known = read["known"].shape
        inputs = (1,) * (adapter["a"].ndim - len(known))
        knows = read["known"].reshape(*stacked, *inputs, rank)
        return {"a": jnp.where(knows, read["a"], adapter["a"]), "b": read["b"]}

    def within(tree: Any, path: str) -> Any:
        if path in given:
            return put(tree, given[path])
        if not isinstance(tree, Mapping):
            return tree
        return {name: within(inner, f"{path}/{name}".lstrip("/")) for name, inner in tree.items()}

    return within(drawn, "") if given else drawn


def lora_of(model: ModelConfig, train: TrainConfig) -> Lora | None:
    """Returns the adapters that the section `train` asks for; None where it asks for none.

    A matrix that would not learn without them, by stage or by `train.trainable`, has none.

    Raises:
      UserError: a name in `train.lora_modules` is none of the model's, or nothing is left to adapt.
    """
    if not train.lora:
        return None
    params = boxed_shapes(model)["params"]
    matrices = {path: box for path, box in _boxes_by_path(params).items() if is_hidden_matrix(box)}
    wanted = set()
    for module in train.lora_modules:
        found = {path for path, box in matrices.items() if _is_of(module, path, box)}
        if not found and module not in MODULES:
            ends = sorted({path.rsplit("/", 1)[-1] for path in matrices})
            raise UserError(
                f"train.lora_modules = {train.lora_modules}: the model has no {module!r}; there "
                f"are {', '.join(MODULES)}, and matrices {', '.join(ends)}"
            )
        wanted |= found
    plain = dataclasses.replace(train, lora=0, lora_from="")
    learns = trainable(plain, nn.meta.unbox(params))
    learning = {path_of(path) for path, on in jax.tree_util.tree_leaves_with_path(learns) if on}
    chosen = tuple(path for path in matrices if path in wanted & learning)
    if not chosen:
        raise UserError(
            f"train.lora_modules = {train.lora_modules}: nothing of it learns in this model in "
            f"stage {train.stage!r}, where train.trainable = {train.trainable!r}; name more"
        )
    scale = scale_of(train.lora, train.lora_alpha, train.lora_scale)
    return Lora(train.lora, scale, chosen, train.lora_from)


def scale_of(rank: int, alpha: float, kind: str) -> float:
    """Returns alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732, eq. 4)."""
    return alpha / (math.sqrt(rank) if kind == "sqrt_rank" else rank)


def learnt_shapes(model: ModelConfig, lora: Lora | None) -> dict[str, Any]:
    """Returns the shapes in boxes of {"params": what learns, "router"}."""
    return boxed_shapes(model) if lora is None else lora.boxes(model)


def _is_of(module: str, path: str, box: Named) -> bool:
    if module in MODULES:
        return MODULES[module](path.split("/"), box)
    return f"/{path}".endswith(f"/{module}")


def _boxes_by_path(params: Any) -> dict[str, Named]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_named)
    return {path_of(path): box for path, box in leaves}
