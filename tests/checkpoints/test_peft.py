"""Adapters in peft's format: what peft computes with ours, what we compute with its own."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.hf.peft import read_adapters, write_adapters
from checkpoints.hf.safetensors import TensorFiles
from checkpoints.hf.safetensors_writer import TensorWriter
from errors import UserError
from model.adapters import COLLECTION, scaled
from tests import tiny
from tests.golden.adapters import write as own
from tests.model.golden import GOLDEN, forward, golden, model, stage, variables
from train.lora import Lora

PLACE = GOLDEN / "adapters"
CASES = own.CASES


def logits_with(case: str, lora: Lora, adapters: dict) -> np.ndarray:
    tree: dict = {}
    for path, factors in adapters.items():
        *parents, name = path.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = {factor: jnp.asarray(factors[factor]) for factor in ("a", "b")}
    given = variables(case) | {COLLECTION: scaled(tree, lora.scale)}
    ids_BT = jnp.asarray(golden(case)["input_ids"])
    return np.asarray(forward(model(case), stage(case), given, ids_BT, jnp.ones_like(ids_BT))[0])


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["ours", "saved"])
@pytest.mark.parametrize("case", CASES)
def test_adapters_compute_what_peft_does(case, kind):
    """By the same tolerance as without adapters (tests/model/golden.py): float32 sums in another
    order. peft's own have all experts in one parameter, rsLoRA's scale and alphas of their own.
    """
    lora, recorded = own.lora(case), np.load(PLACE / case / "golden.npz")[kind]
    found = read_adapters(PLACE / case / kind, model(case), lora.matrices, lora.rank, lora.scale)
    logits_BTV = logits_with(case, lora, found)
    np.testing.assert_allclose(logits_BTV, recorded, atol=3e-4)
    assert np.abs(recorded - golden(case)["logits"]).max() > 0.3


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_peft_has_read(case, tmp_path):
    """Byte for byte; and read again they are the same adapters."""
    own.write(case, tmp_path)
    for file in sorted((PLACE / case / "ours").iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name
    lora, expected = own.lora(case), own.drawn(case)
    found = read_adapters(tmp_path, model(case), lora.matrices, lora.rank, lora.scale)
    assert found.keys() == expected.keys()
    for path, factors in expected.items():
        assert found[path].pop("known").all()
        tiny.assert_close(found[path], factors)


def test_adapters_that_have_learnt_nothing_keep_the_factor_that_is_drawn(tmp_path):
    """Keys and values are one Linear in torch: with B at 0 nothing says whose A is whose but its
    place. Without A they could never learn.
    """
    case = "deepseek_v3"
    lora, drawn = own.lora(case), own.drawn(case)
    fresh = {path: {"a": of["a"], "b": 0 * of["b"]} for path, of in drawn.items()}
    scale = lora.scale
    write_adapters(tmp_path, model(case), fresh, rank=lora.rank, scale=scale, base="")
    found = read_adapters(tmp_path, model(case), lora.matrices, lora.rank, scale)
    for path, factors in fresh.items():
        np.testing.assert_array_equal(found[path]["a"], factors["a"], err_msg=path)


def test_a_larger_rank_and_another_scale_add_the_same(tmp_path):
    """What the directory has no factors for is left to be drawn, and adds nothing yet."""
    case = "deepseek_v3"
    lora, drawn = own.lora(case), own.drawn(case)
    own.write(case, tmp_path)
    found = read_adapters(tmp_path, model(case), lora.matrices, 5, 2 * lora.scale)
    path = "layers_1/block_0/attention/query_up"
    before, after = drawn[path], found[path]
    np.testing.assert_allclose(
        2 * np.einsum("lir,lrnh->linh", after["a"], after["b"]),
        np.einsum("lir,lrnh->linh", before["a"], before["b"]),
        rtol=1e-5,  # float32 products
        atol=1e-7,
    )
    np.testing.assert_array_equal(after["known"][0], [True, True, False, False, False])


def changed(directory: Path, change=lambda tensors: None, **config) -> Path:
    """Copies the adapters that peft saved, with tensors or keys of the config changed."""
    files = TensorFiles(PLACE / "deepseek_v3" / "saved")
    tensors = {name: files.read(name) for name in files.tensors}
    change(tensors)
    plan = [(name, x.dtype, x.shape) for name, x in tensors.items()]
    with TensorWriter(directory, plan, "test", single="adapter_model.safetensors") as writer:
        for name, x in tensors.items():
            writer.write(name, x)
    keys = json.loads((files.directory / "adapter_config.json").read_text()) | config
    (directory / "adapter_config.json").write_text(json.dumps(keys))
    return directory


OUT = "base_model.model.model.layers.0.self_attn.o_proj"


def renamed(tensors: dict, name: str) -> None:
    for letter in "AB":
        tensors[f"{name}.lora_{letter}.weight"] = tensors.pop(f"{OUT}.lora_{letter}.weight")


WRONG = {
    "no LoRA": ({"peft_type": "IA3"}, "peft_type is 'IA3', not LORA"),
    "DoRA": ({"use_dora": True}, "use_dora = True is not supported"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head'] is not"),
    "half of it": (
        {"change": lambda t: t.pop(f"{OUT}.lora_B.weight")},
        "model.layers.0.self_attn.o_proj: lora_A and lora_B must be matrices",
    ),
    "an embedding": (
        {"change": lambda t: t.update({"base_model.model.lora_embedding_A": np.zeros((2, 3))})},
        "tensor base_model.model.lora_embedding_A is no factor of a Linear's adapter",
    ),
    "another model": (
        {"change": lambda t: renamed(t, "base_model.model.model.layers.9.self_attn.o_proj")},
        "model.layers.9.self_attn.o_proj has adapters, and the model has no such matrix",
    ),
    "another width": (
        {"change": lambda t: t.update({f"{OUT}.lora_A.weight": np.zeros((2, 31), np.float32)})},
        "the adapter of model.layers.0.self_attn.o_proj is [48, 2] x [2, 31], and the matrix",
    ),
    "no number": (
        {"change": lambda t: t.update({f"{OUT}.lora_A.weight": np.full((2, 30), np.nan)})},
        "model.layers.0.self_attn.o_proj: lora_A and lora_B must be matrices of finite numbers",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_adapters_is_one_line(what, tmp_path):
    change, words = WRONG[what]
    lora, case = own.lora("deepseek_v3"), "deepseek_v3"
    with pytest.raises(UserError) as error:
        read_adapters(changed(tmp_path, **change), model(case), lora.matrices, 2, lora.scale)
    assert words in str(error.value) and str(tmp_path) in str(error.value)


def test_adapters_that_find_no_place_are_one_line(tmp_path):
    case, saved = "deepseek_v3", PLACE / "deepseek_v3" / "saved"
    lora = own.lora(case)
    with pytest.raises(UserError, match=r"q_a_proj has rank 2; give train.lora at least that"):
        read_adapters(saved, model(case), lora.matrices, 1, lora.scale)
    without = [path for path in lora.matrices if "router" not in path]
    with pytest.raises(UserError, match=r"mlp.gate has adapters, and .*moe/router has none"):
        read_adapters(saved, model(case), without, 2, lora.scale)
    with pytest.raises(UserError, match=r"adapter_config.json: no such file"):
        read_adapters(tmp_path, model(case), lora.matrices, 2, lora.scale)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model.safetensors: there already"):
        own.write(case, tmp_path)
    drawn = own.drawn(case)
    with pytest.raises(UserError, match=r"canon_kernel_size = 3 \(must be 0\)"):
        write_adapters(tmp_path / "new", tiny.MODEL, drawn, rank=2, scale=1.0, base="")
