"""Trees of arrays by the paths of their leaves, and how two of them differ."""

from collections.abc import Mapping
from typing import Any

import jax

# The shape and the dtype of an array.
Spec = tuple[tuple[int, ...], str]


def by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, such as `params/embedding`.

    Args:
      tree: a state, of dictionaries or of structs, or Orbax's records of one.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def specs(tree: Any) -> dict[str, Spec]:
    """Returns the shape and dtype of each leaf by its path, of arrays or of Orbax's records."""
    return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in by_path(tree).items()}


def difference_between(there: Mapping[str, Spec], here: Mapping[str, Spec]) -> str | None:
    """Returns a clause that names the first difference between two trees, or None if they agree.

    It says how many more differences there are. Parameters come before the optimizer's copies of
    them.

    Args:
      there: the `specs` of a checkpoint.
      here: the `specs` that this config asks for.
    """
    clauses = {}
    for name in {**here, **there}:
        if name not in there:
            clauses[name] = f"{name} is not there, {_shape(here[name])} in this config"
        elif name not in here:
            clauses[name] = f"{name} is {_shape(there[name])} there, not in this config"
        elif here[name][0] != there[name][0]:
            shapes = _shape(there[name]), _shape(here[name])
            clauses[name] = f"{name} is {shapes[0]} there, {shapes[1]} in this config"
        elif here[name][1] != there[name][1]:
            clauses[name] = f"{name} is {there[name][1]} there, {here[name][1]} in this config"
    if not clauses:
        return None
    more = f" (and {len(clauses) - 1} more)" if len(clauses) > 1 else ""
    return clauses[min(clauses, key=lambda name: not name.startswith("params/"))] + more


def _shape(spec: Spec) -> str:
    return f"[{','.join(map(str, spec[0]))}]"
