"""Rotary positions in config.json, read and written.

Both styles are read and written: that of the released files (`rope_scaling`, with `rope_theta`
beside it), which transformers 4 and most others read, and that of transformers 5
(`rope_parameters`).
"""

import math
from typing import Any

from checkpoints.hf.config_keys import ConfigReader, ConfigWriter

KNOWN = {
    "default": {"rope_theta", "rope_type", "type", "partial_rotary_factor"},
    "yarn": {
        *("rope_theta", "rope_type", "type", "partial_rotary_factor"),
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("truncate", "attention_factor", "mscale", "mscale_all_dim"),
    },
}


def read_rope(
    reader: ConfigReader, partial_rotary_factor: float = 1.0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the fields of model.rope, and the rope keys themselves.

    Args:
      reader: the keys of config.json.
      partial_rotary_factor: the share of a head's channels that is rotated, where no key says so;
        with 1 all of them must be.

    Raises:
      UserError: a kind of rope, or a key of it, is not supported.
    """
    rope = _rope_keys(reader, partial_rotary_factor)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in tuple(KNOWN):  # which may be a list, and has no hash then
        raise reader.unsupported("rope_type", kind, 'only "default" and "yarn" are supported')
    fields = {
        "rope.rope_theta": rope["rope_theta"],
        "rope.factor": 1.0,
        "rope.attention_factor": 1.0,
    }
    if kind == "yarn":
        fields |= _yarn_fields(reader, rope)
    for name in sorted(rope.keys() - KNOWN[kind]):
        raise reader.unsupported(name, rope[name], _unknown(name, kind, rope))
    return fields, rope


def write_rope(
    writer: ConfigWriter, partial_rotary_factor: float | None = None, **more: float
) -> dict[str, Any]:
    """Returns the rope keys in both styles, and the context that YaRN leads to.

    Refuses a field that no config.json can express.

    Args:
      partial_rotary_factor: the share of a head's channels that is rotated, where that is a key.
      more: further keys of YaRN.
    """
    r = writer.model.rope
    theta: dict[str, Any] = {"rope_theta": r.rope_theta}
    if partial_rotary_factor is not None:
        theta["partial_rotary_factor"] = partial_rotary_factor
    if r.factor == 1:
        writer.require(r.attention_factor == 1, "rope.attention_factor", "1 without rope.factor")
        new = {"rope_type": "default"} | theta
        return theta | {"rope_scaling": None, "rope_parameters": new}
    names = ("factor", "original_max_position_embeddings", "attention_factor")
    names += ("beta_fast", "beta_slow", "truncate")
    yarn = {"rope_type": "yarn"} | {name: getattr(r, name) for name in names} | more
    context = round(r.factor * r.original_max_position_embeddings)
    return theta | {
        "rope_scaling": yarn,
        "rope_parameters": yarn | theta,
        "max_position_embeddings": context,
    }


def magnitude(factor: float, mscale: float) -> float:
    """Returns YaRN's magnitude, 0.1 mscale ln(factor) + 1.

    For mscale 1 it is the square root of the paper's 1 / t (arXiv 2309.00071, eq. 22).
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def mscale_of(factor: float, magnitude: float) -> float:
    """Returns the mscale that has this magnitude; the inverse of `magnitude`."""
    return (magnitude - 1) / (0.1 * math.log(factor))


def _rope_keys(reader: ConfigReader, partial_rotary_factor: float) -> dict[str, Any]:
    """Returns the rope keys, wherever they stand, with defaults for the two that all ropes have."""
    new, old = reader.take("rope_parameters", {}), reader.take("rope_scaling", {})
    rope = dict(old or new)  # transformers prefers the old, should both be there
    reader.ignore("rope_theta", "original_max_position_embeddings")
    default = partial_rotary_factor
    partial = reader.take("partial_rotary_factor", default, null=default)
    partial = rope.get("partial_rotary_factor") or partial
    rope["partial_rotary_factor"] = partial
    if partial_rotary_factor == 1 and partial != 1:
        why = "only 1 is supported in this architecture"
        raise reader.unsupported("partial_rotary_factor", partial, why)
    if any(isinstance(value, dict) for value in rope.values()):
        why = "positions that differ from layer to layer are not supported"
        raise reader.unsupported("rope_parameters", rope, why)
    for name, value in rope.items():
        if name not in ("rope_type", "type") and not isinstance(value, int | float | None):
            raise reader.unsupported(name, value, "must be a number")
    return rope | {
        "rope_theta": float(rope.get("rope_theta") or reader.take("rope_theta", 10_000.0))
    }


def _unknown(name: str, kind: str, rope: dict[str, Any]) -> str:
    """Says what is to be done with a key of a rope that is not known."""
    if kind == "yarn" and name == "attn_factor" and isinstance(rope.get("factor"), int | float):
        plain = magnitude(rope["factor"], 1.0)
        return (
            f"transformers ignores it and takes {plain:.6g}, vLLM takes {plain * rope[name]:.6g};"
            f' write the one that is meant as "attention_factor" in its place'
        )
    known = ", ".join(sorted(KNOWN[kind]))
    return f"not a key of rope_type {kind} that is supported (these are: {known}); remove it"


def _yarn_fields(reader: ConfigReader, rope: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of YaRN.

    As in transformers, the ratio of the two contexts stands in for a missing factor, and the ratio
    of the mscales' magnitudes for a missing magnitude.
    """
    beside = rope.get("original_max_position_embeddings")
    context = reader.take("original_max_position_embeddings", 0, null=0)
    context = context or beside or reader.take("max_position_embeddings")
    factor = float(rope.get("factor") or reader.take("max_position_embeddings") / context)
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            attention_factor = magnitude(factor, rope["mscale"])
            attention_factor /= magnitude(factor, rope["mscale_all_dim"])
        else:
            attention_factor = magnitude(factor, 1.0)
    return {
        "rope.factor": factor,
        "rope.original_max_position_embeddings": int(context),
        "rope.beta_fast": float(rope.get("beta_fast") or 32),
        "rope.beta_slow": float(rope.get("beta_slow") or 1),
        "rope.truncate": bool(rope.get("truncate", True)),
        "rope.attention_factor": float(attention_factor),
    }
