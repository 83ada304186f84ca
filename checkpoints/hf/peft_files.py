"""The two files of peft's format: which Linears have factors, and the factors themselves.

`peft.py` says how they are our adapters.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints.hf.safetensors import TensorFiles
from checkpoints.hf.safetensors_writer import TensorWriter
from errors import UserError
from files import read_json, write_json
from model.config import ModelConfig

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")
# Wherever a model has experts, peft takes these names of target_modules for the parameters that
# transformers (from 5 on) has of all of them.
EXPERT_NAMES = ("gate", "gate_proj", "up_proj", "down_proj")
# What else an adapter_config.json may ask for, and the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "layer_replication": (None, []),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_dora": (False,),
}


class Factors(NamedTuple):
    """The factors of one torch Linear: lora_A [rank, in], lora_B [out, rank], and their scale."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        """The inner width of the product."""
        return len(self.a)


def adapter_config(
    linears: Sequence[str],
    factors: Mapping[str, Factors],
    rank: int,
    scale: float,
    base: str,
    *,
    experts: bool,
) -> dict[str, Any]:
    """Returns the keys of adapter_config.json.

    A Linear goes by the end of its name where all of that end have factors. Where a model has
    experts and Linears beside them of the same names, these go by their parameter, "NAME.weight":
    so peft reads them with transformers 5; without such Linears it reads them with 4 too.

    Args:
      linears: the names of all Linears of the model, one for each matrix of an expert.
      factors: by the names of those that have any.
      rank: that of most.
      base: the Hugging Face checkpoint that they are of, or "".
      experts: whether the model has any.
    """
    alpha = _number(rank * scale)
    own = [name for name in linears if ".experts." not in name]
    beside = experts and any(_end(name) in EXPERT_NAMES[1:] for name in own if name in factors)
    modules, parameters, ranks, alphas = set(), set(), {}, {}

    def short(name: str) -> str:
        """Returns the end of a name, or the whole where others of this end have other factors."""
        same = [factors.get(other) for other in own if _end(other) == _end(name)]
        alike = all(one is not None and one.rank == factors[name].rank for one in same)
        return _end(name) if alike else name

    for name in own:
        if name not in factors:
            continue
        if beside and _end(name) in EXPERT_NAMES:
            parameters.add(f"{name}.weight")
        else:
            modules.add(short(name))
        if (its := factors[name].rank) != rank:
            ranks[short(name)], alphas[short(name)] = its, _number(its * scale)
    of_experts = [name for name in linears if ".experts." in name]
    for name in of_experts:
        if name not in factors:
            continue
        if not beside and all(one in factors for one in of_experts):
            modules.add(_end(name))
            continue
        stem, joined = name.partition(".experts.")[0], "down_proj"
        if _end(name) != joined:
            joined = "gate_up_proj"
            ranks[f".*\\.{joined}"], alphas[f".*\\.{joined}"] = 2 * rank, _number(2 * rank * scale)
        parameters.add(f"{stem}.experts.{joined}")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def write_modules(
    directory: Path, factors: Mapping[str, Factors], config: Mapping[str, Any]
) -> None:
    """Writes adapter_model.safetensors, and last adapter_config.json.

    Raises UserError where they cannot be written, or others are there.
    """
    arrays = {
        f"{PREFIX}{name}.lora_{letter}.weight": np.ascontiguousarray(x, np.float32)
        for name, both in factors.items()
        for letter, x in (("A", both.a), ("B", both.b))
    }
    for file in directory.glob("*.safetensors"):
        raise UserError(f"{file}: there already; delete it, or write to another directory")
    size = sum(x.nbytes for x in arrays.values())
    plan = [(name, x.dtype, x.shape) for name, x in arrays.items()]
    with TensorWriter(directory, plan, "adapters", size, TENSORS) as writer:
        for name, x in arrays.items():
            writer.write(name, x)
    write_json(directory / CONFIG, config)


def read_modules(directory: Path, model: ModelConfig) -> dict[str, Factors]:
    """Returns the factors of each Linear, those of experts one by one.

    Raises:
      UserError: there are no such files, or they ask for what is no LoRA of Linears.
    """
    config = read_json(directory / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{directory / CONFIG}: peft_type is {config.get('peft_type')!r}, not LORA")
    for name, allowed in UNSUPPORTED.items():
        if config.get(name, allowed[0]) not in allowed:
            raise UserError(f"{directory / CONFIG}: {name} = {config[name]!r} is not supported")
    files, pairs = TensorFiles(directory), dict[str, dict[str, np.ndarray]]()
    for name in files.tensors:
        match = NAME.fullmatch(name)
        if match is None:
            raise UserError(f"{directory}: tensor {name} is no factor of a Linear's adapter")
        pairs.setdefault(match["module"], {})[match["letter"]] = files.read(name).astype(np.float32)
    found = {}
    for module, pair in pairs.items():
        if len(pair) != 2 or any(x.ndim != 2 or not np.isfinite(x).all() for x in pair.values()):
            raise UserError(
                f"{directory}: {module}: lora_A and lora_B must be matrices of finite numbers"
            )
        if re.search(r"\.experts(\.base_layer)*$", module):
            found |= _of_experts(directory, config, model, module, pair["A"], pair["B"])
        else:
            scale = _scale(config, (module, f"{module}.weight"), len(pair["A"]))
            found[module] = Factors(pair["A"], pair["B"], scale)
    return found


def _of_experts(
    directory: Path, config: dict, model: ModelConfig, module: str, a: np.ndarray, b: np.ndarray
) -> Iterator[tuple[str, Factors]]:
    """Yields the factors of each expert of a parameter of all of them.

    peft has lora_A as [experts * rank, in] and lora_B as [out, rank * experts].
    """
    E, D, F = model.moe.num_experts, model.hidden_size, model.moe.intermediate_size
    parts = {(D, 2 * F): ("gate_proj", "up_proj"), (F, D): ("down_proj",)}
    names = parts.get((a.shape[1], b.shape[0]))
    if names is None or len(a) % E or b.shape[1] != len(a):
        raise UserError(f"{directory}: {module} has adapters that fit no parameter of all experts")
    stem, rank = re.sub(r"(\.base_layer)*$", "", module), len(a) // E
    parameter = "down_proj" if len(names) == 1 else "gate_up_proj"
    scale = _scale(config, (f"{stem}.{parameter}",), rank)
    a_ErI, b_OrE = a.reshape(E, rank, -1), b.reshape(len(b), rank, E)
    for expert in range(E):
        rows = np.split(b_OrE[..., expert], len(names))
        for name, own in zip(names, rows, strict=True):
            yield f"{stem}.{expert}.{name}", Factors(a_ErI[expert], own, scale)


def _scale(config: Mapping[str, Any], names: Sequence[str], rank: int) -> float:
    """Returns what the product of factors is multiplied by, as peft looks it up."""
    patterns = config.get("alpha_pattern") or {}
    own = [
        value
        for key, value in patterns.items()
        if any(re.match(rf"(.*\.)?({key})$", name) for name in names)
    ]
    alpha = own[0] if own else config.get("lora_alpha", 8)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _number(value: float) -> int | float:
    """Returns an int where the value is one: most readers of peft's files know no other alpha."""
    return int(value) if value == int(value) else value
