"""Rotary positions in config.json, read and written.

Both styles are read: that of the released files (`rope_scaling`, with `rope_theta` beside it) and
that of transformers 5 (`rope_parameters`). The latter is written.
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
        why = f"not a key of rope_type {kind} that is supported"
        raise reader.unsupported(name, rope[name], why)
    return fields, rope


def write_rope(writer: ConfigWriter, **more: float) -> dict[str, Any]:
    """Returns the value of "rope_parameters", `more` keys of it included.

    Raises:
      UserError: no config.json can express the model's rope.
    """
    r = writer.model.rope
    if r.factor == 1:
        writer.require(r.attention_factor == 1, "rope.attention_factor", "1 without rope.factor")
        return {"rope_theta": r.rope_theta, "rope_type": "default"} | more
    names = ("factor", "original_max_position_embeddings", "attention_factor")
    names += ("beta_fast", "beta_slow", "truncate")
    yarn = {name: getattr(r, name) for name in names}
    return {"rope_theta": r.rope_theta, "rope_type": "yarn"} | more | yarn


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
    partial = rope.get("partial_rotary_factor") or reader.take(
        "partial_rotary_factor", partial_rotary_factor
    )
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


def _yarn_fields(reader: ConfigReader, rope: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of YaRN.

    As in transformers, the ratio of the two contexts stands in for a missing factor, and the ratio
    of the mscales' magnitudes for a missing magnitude.
    """
    context = reader.take(
        "original_max_position_embeddings",
        rope.get("original_max_position_embeddings") or reader.take("max_position_embeddings"),
    )
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
