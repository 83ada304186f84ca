"""Checkpoints on disk: names, blocks of float8, the MTP module's layout, shards."""

import copy
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from cases import Case
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpLayer

BLOCK = 128
FP8 = torch.float8_e4m3fn
# The router is not among them: its name is mlp.gate.
QUANTISED = re.compile(r"(self_attn\.\w*_proj(_with_mqa)?|mlp\..*(gate|up|down)_proj)\.weight")


def empty(case: Case) -> PreTrainedModel:
    """Makes a model of the case's configuration in float32, every operation the plain one."""
    if case.released:
        with tempfile.TemporaryDirectory() as directory:
            write_config(
                Path(directory),
                {key: value for key, value in case.config.items() if key != "quantization_config"},
            )
            config = AutoConfig.from_pretrained(directory)
    else:
        config = AutoConfig.for_model(**case.config)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()


def load(directory: Path) -> PreTrainedModel:
    """Reads the checkpoint as transformers does, in float32.

    Float8 weights are dequantised here first, in a copy (transformers would want a GPU).
    """
    config = json.loads((directory / "config.json").read_text())
    with tempfile.TemporaryDirectory() as copy:
        if config.pop("quantization_config", None):
            tensors = dequantise(load_file(directory / "model.safetensors"))
            write(Path(copy), config, tensors)
            directory = Path(copy)
        return AutoModelForCausalLM.from_pretrained(
            directory,
            attn_implementation="eager",
            experts_implementation="eager",
            dtype=torch.float32,
        ).eval()


def saved(model: PreTrainedModel) -> tuple[dict, dict[str, torch.Tensor]]:
    """Returns config.json and the tensors, as `save_pretrained` writes them."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return json.loads(Path(directory, "config.json").read_text()), load_file(
            Path(directory, "model.safetensors")
        )


def unfused(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors that a parameter is on disk, by name.

    In memory transformers has all experts' matrices in one tensor, gate [E, F, D] and up [E, F, D]
    joined on F.
    """
    stem, fused, matrix = name.partition(".experts.")
    if not fused:
        yield name, tensor
        return
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[matrix]
    for expert, joined in enumerate(tensor):
        for part, weight in zip(parts, joined.chunk(len(parts)), strict=True):
            yield f"{stem}.experts.{expert}.{part}.weight", weight.contiguous()


def mtp_layer(model: PreTrainedModel) -> MtpLayer:
    """Makes an MTP module for `model`.

    It is a decoder layer of the model's class, with experts, full attention, and an indexer if the
    model has one.
    """
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    layer_types = getattr(model.config, "layer_types", None)
    for field, value in (
        ("first_k_dense_replace", 0),
        ("mlp_only_layers", []),
        ("mlp_layer_types", ["sparse"]),
        ("layer_types", layer_types[-1:] if layer_types else None),
    ):
        if hasattr(config, field):
            setattr(config, field, value)
    return MtpLayer(config, type(model.model.layers[-1]), type(model.model.norm), 0).eval()


def mtp_tensors(
    layer: MtpLayer, main: dict[str, torch.Tensor], layers: int
) -> dict[str, torch.Tensor]:
    """Returns the tensors of an MTP module as they are released.

    DeepSeek-V3's are a decoder layer beyond the last, with the projection, its norms, and copies of
    embedding and head. Qwen3-Next's have the prefix `mtp` (transformers drops them; names as in
    vLLM, which runs them).
    """
    own = {
        name: part
        for disk, tensor in layer.state_dict().items()
        for name, part in unfused(disk, tensor)
    }
    if layer.config.model_type == "qwen3_next":
        renamed = {
            "enorm": "pre_fc_norm_embedding",
            "hnorm": "pre_fc_norm_hidden",
            "eh_proj": "fc",
            "post_norm": "norm",
        }
        found = {}
        for name, tensor in own.items():
            parts = name.replace("mtp_block.", "layers.0.").split(".")
            found[".".join(["mtp", *(renamed.get(part, part) for part in parts)])] = tensor
        return found
    own = {
        name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm."): part
        for name, part in own.items()
    }
    copies = {
        "embed_tokens.weight": main["model.embed_tokens.weight"].clone(),
        "shared_head.head.weight": main["lm_head.weight"].clone(),
    }
    return {f"model.layers.{layers}.{name}": tensor for name, tensor in (copies | own).items()}


def over_blocks(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Repeats the numbers of blocks, [ceil(out/128), ceil(in/128)], over them: [out, in]."""
    return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]


def quantise(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Returns the tensors with matrices in float8, and the scales of their blocks of 128x128.

    A block's scale takes its largest weight to float8's largest. Blocks are first made of unlike
    sizes.
    """
    rng = torch.Generator().manual_seed(seed)
    quantised = {}
    for name, tensor in tensors.items():
        if not QUANTISED.search(name):
            quantised[name] = tensor
            continue
        rows, columns = (-(-size // BLOCK) for size in tensor.shape)
        tensor = tensor.float() * over_blocks(
            2 ** (2 * torch.rand(rows, columns, generator=rng) - 1), tensor.shape
        )
        largest = torch.stack(
            [
                torch.stack([block.abs().max() for block in row.split(BLOCK, 1)])
                for row in tensor.split(BLOCK, 0)
            ]
        )
        scale = largest / torch.finfo(FP8).max
        quantised[name] = (tensor / over_blocks(scale, tensor.shape)).to(FP8)
        quantised[f"{name}_scale_inv"] = scale
    return quantised


def dequantise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Multiplies float8 by its blocks' scales, in float32; other tensors stay as they are."""
    scales = {
        name.removesuffix("_scale_inv"): tensor
        for name, tensor in tensors.items()
        if name.endswith("_scale_inv")
    }
    return {
        name: tensor.float() * over_blocks(scales[name], tensor.shape) if name in scales else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }


def write_config(directory: Path, config: dict) -> None:
    """Writes config.json."""
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write(directory: Path, config: dict, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Writes config.json and the tensors, in the order of their names.

    They go into model.safetensors, or into shards of about one size, and their index.
    """
    write_config(directory, config)
    size = {
        name: tensor.numel() * tensor.element_size() for name, tensor in sorted(tensors.items())
    }
    total, before, files = sum(size.values()), 0, {}
    for name in size:
        file = (
            "model.safetensors"
            if shards == 1
            else f"model-{before * shards // total + 1:05}-of-{shards:05}.safetensors"
        )
        files.setdefault(file, {})[name] = tensors[name].contiguous()
        before += size[name]
    for file, part in files.items():
        save_file(part, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors makes files that only their owner reads
    if shards > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, part in files.items() for name in part},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
