"""launch.convert on the golden checkpoints: there and back to the bit, stopped and run again, and
what is wrong with a checkpoint in one line.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoints.hf.checkpoint import HFCheckpoint
from checkpoints.hf.config import config_json, export_refusals, model_fields
from checkpoints.hf.safetensors import TensorFiles
from checkpoints.hf.safetensors_writer import TensorWriter
from checkpoints.streamed import StreamedWriter
from errors import UserError
from experiment.config_files import base_config_from, with_checkpoint_fields
from experiment.schema import Config, parse
from experiment.workdir import recorded_config
from launch import convert
from model.mesh import MeshConfig
from model.sharding import make_mesh
from tests import tiny
from tests.model.golden import CASES, GOLDEN, model
from train.restore import load_variables

ONE = MeshConfig(data=1, fsdp=1, expert=1, tensor=1)


def one_device():
    return make_mesh(ONE, jax.devices()[:1])


def run_convert(source: object, target: object, dtype: str = "") -> None:
    """Runs launch.convert --from=source --to=target."""
    convert.run(to=str(target), dtype=dtype, **{"from": str(source)})


def there_and_back(case: str, directory: Path, dtype: str = "") -> tuple[Path, Path]:
    """Converts a golden checkpoint into a workdir and back; returns both results."""
    workdir, back = directory / "workdir", directory / "back"
    run_convert(f"hf:{GOLDEN / case}", workdir, dtype)
    run_convert(workdir, f"hf:{back}")
    return workdir, back


def changed(case: str, directory: Path, change=lambda tensors: None, **config) -> Path:
    """Writes a golden checkpoint with its tensors (name -> array) or its config changed; a key
    given as None is dropped.
    """
    target = directory / "changed"
    target.mkdir()
    files = TensorFiles(GOLDEN / case)
    tensors = {name: files.read(name) for name in files.tensors}
    change(tensors)
    with TensorWriter(
        target, [(name, array.dtype, array.shape) for name, array in tensors.items()], source="test"
    ) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    keys = json.loads((GOLDEN / case / "config.json").read_text()) | config
    dropped = {name for name, value in config.items() if value is None}
    kept = {name: value for name, value in keys.items() if name not in dropped}
    (target / "config.json").write_text(json.dumps(kept))
    return target


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_the_same(case, tmp_path):
    """Every tensor comes back bit by bit in the type it had, and every other file. FP8 comes back
    as what it stands for, in float32, and config.json says so.
    """
    workdir, back = there_and_back(case, tmp_path)
    before, after = TensorFiles(GOLDEN / case), TensorFiles(back)
    assert {name for name in before.tensors if not name.endswith("_scale_inv")} == set(
        after.tensors
    )
    source = HFCheckpoint(GOLDEN / case, model(case))
    for name, info in after.tensors.items():
        expected = source.rows(name, 0, info.shape[0])
        assert info.dtype == expected.dtype and after.read(name).tobytes() == expected.tobytes(), (
            name
        )
    for file in GOLDEN.joinpath(case).iterdir():
        if file.suffix == ".json" and not file.name.endswith(".index.json") and "fp8" not in case:
            assert json.loads((back / file.name).read_text()) == json.loads(file.read_text()), (
                file.name
            )
    if "fp8" in case:
        keys = json.loads((back / "config.json").read_text())
        assert "quantization_config" not in keys and keys["torch_dtype"] == "float32"
    # And in between it is a model like any other.
    config = parse(recorded_config(workdir))
    found, expected = (
        load_variables(config.model, one_device(), origin)
        for origin in (workdir, f"hf:{GOLDEN / case}")
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("case", CASES)
def test_a_model_describes_itself(case, tmp_path):
    """The config.json written for a model that came from nowhere reads as the same model."""
    names = TensorFiles(GOLDEN / case).tensors
    (tmp_path / "config.json").write_text(json.dumps(config_json(model(case), "float32")))
    found = model_fields(tmp_path, names)
    expected = model_fields(GOLDEN / case, names) | {"dtype": "float32"}
    for name, value in expected.items():
        if isinstance(value, float):
            value = pytest.approx(value, rel=1e-12)  # magnitudes go through a logarithm
        assert found[name] == value, name


def test_bfloat16_is_half_the_disk_and_no_loss_to_bfloat16_weights(tmp_path):
    """deepseek_v3_released is stored in bfloat16, its router's biases in float32: they are kept,
    and the way back is exact.
    """
    case = "deepseek_v3_released"
    workdir, back = there_and_back(case, tmp_path, dtype="bfloat16")
    before, after = TensorFiles(GOLDEN / case), TensorFiles(back)
    assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before.tensors)
    config = parse(recorded_config(workdir))
    found, expected = (
        load_variables(config.model, one_device(), origin)
        for origin in (workdir, f"hf:{GOLDEN / case}")
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_stopped_and_run_again(tmp_path, monkeypatch):
    """The command is stopped in the middle of either way. Run again it goes on, writes no block
    twice, and the result is the same.
    """
    case, source = "deepseek_v32", f"hf:{GOLDEN / 'deepseek_v32'}"
    written = {StreamedWriter: [], TensorWriter: []}

    def stop_after(kind, count):
        plain = kind.write

        def write(self, name, *rest):
            if len(written[kind]) == count:
                raise KeyboardInterrupt
            plain(self, name, *rest)
            written[kind].append(name)

        monkeypatch.setattr(kind, "write", write)

    stop_after(StreamedWriter, 40)
    with pytest.raises(KeyboardInterrupt):
        run_convert(source, tmp_path / "workdir")
    with pytest.raises(UserError, match="no checkpoint there"):
        load_variables(model(case), one_device(), tmp_path / "workdir")
    monkeypatch.undo()
    first = len(written[StreamedWriter])
    stop_after(StreamedWriter, 10_000)
    run_convert(source, tmp_path / "workdir")
    # What was pending when it stopped is written again, and nothing else.
    assert len(written[StreamedWriter]) - first < len(TensorFiles(GOLDEN / case).tensors) + 20

    monkeypatch.setattr("checkpoints.convert.SHARD_BYTES", 60_000)
    stop_after(TensorWriter, 50)
    with pytest.raises(KeyboardInterrupt):
        run_convert(tmp_path / "workdir", f"hf:{tmp_path / 'back'}")
    assert not (tmp_path / "back" / "config.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr("checkpoints.convert.SHARD_BYTES", 60_000)
    run_convert(tmp_path / "workdir", f"hf:{tmp_path / 'back'}")
    before, after = TensorFiles(GOLDEN / case), TensorFiles(tmp_path / "back")
    assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before.tensors)


def config_of(directory: Path) -> Config:
    """The config that a command makes of hf:DIR."""
    return parse(with_checkpoint_fields(base_config_from(f"hf:{directory}"), ()))


def broken(tensors: dict, name: str, change) -> None:
    """Changes one of a checkpoint's tensors."""
    tensors[name] = change(tensors[name])


HEAD, NORM, UP = (
    "lm_head.weight",
    "model.norm.weight",
    "model.layers.1.mlp.experts.0.up_proj.weight",
)
WRONG = {
    "missing": (
        "deepseek_v3",
        {"change": lambda t: t.pop(UP)},
        f"tensor {UP} is missing (config.json calls for it, [8, 48])",
    ),
    "extra": (
        "deepseek_v3",
        {"change": lambda t: t.update({"model.layers.1.extra": t[NORM]})},
        "tensor model.layers.1.extra is not part of the model",
    ),
    "misshapen": (
        "deepseek_v3",
        {"change": lambda t: broken(t, HEAD, lambda x: x[:-1])},
        "lm_head.weight is [79, 48], and config.json calls for [80, 48]",
    ),
    "integers": (
        "deepseek_v3",
        {"change": lambda t: broken(t, NORM, lambda x: x.astype(np.int32))},
        "tensor model.norm.weight is of type int32",
    ),
    "half an MTP module": (
        "deepseek_v3",
        {"change": lambda t: t.pop("model.layers.3.enorm.weight")},
        "tensor model.layers.3.enorm.weight is missing",
    ),
    "an MTP head of its own": (
        "deepseek_v3",
        {"change": lambda t: broken(t, "model.layers.3.shared_head.head.weight", lambda x: x + 1)},
        "tensor model.layers.3.shared_head.head.weight differs from lm_head.weight",
    ),
    "no scale": (
        "deepseek_v3_fp8",
        {"change": lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv")},
        "up_proj.weight_scale_inv is missing",
    ),
    "another scale": (
        "deepseek_v3_fp8",
        {
            "change": lambda t: broken(
                t, "model.layers.0.mlp.up_proj.weight_scale_inv", lambda x: x[:1]
            )
        },
        "in blocks of [128, 128] it must be",
    ),
    "another quantisation": (
        "deepseek_v3",
        {"quantization_config": {"quant_method": "gptq"}},
        '"quant_method": "gptq" is not supported',
    ),
    "another architecture": (
        "qwen3",
        {"architectures": ["LlamaForCausalLM"]},
        'architecture "LlamaForCausalLM" is not supported (these are: DeepseekV3',
    ),
    "another activation": (
        "qwen3",
        {"hidden_act": "gelu"},
        '"hidden_act": "gelu": only "silu" is supported',
    ),
    "biases": (
        "qwen3",
        {"attention_bias": True},
        '"attention_bias": true: only false is supported',
    ),
    "a window": ("qwen3", {"use_sliding_window": True}, '"use_sliding_window": true'),
    "layers of a kind it does not know": (
        "qwen3_next",
        {"layer_types": ["mamba"] * 8},
        '"layer_types": "mamba": only',
    ),
    "another rope": (
        "qwen3",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        '"rope_type": "llama3"',
    ),
    "a rope key": (
        "qwen3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "low_freq_factor": 2}},
        '"low_freq_factor": 2',
    ),
    "softmax in DeepSeek": (
        "deepseek_v3",
        {"scoring_func": "softmax"},
        '"scoring_func": "softmax": only "sigmoid"',
    ),
    "a key nobody knows": (
        "qwen3",
        {"logit_softcap": 30.0},
        '"logit_softcap": 30.0: unknown here, and it may change what the model computes',
    ),
    "a key missing": ("qwen3", {"hidden_size": None}, 'no key "hidden_size"'),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_checkpoint_is_one_line(what, tmp_path):
    case, change, words = WRONG[what]
    directory = changed(case, tmp_path, **change)
    with pytest.raises(UserError) as error:
        run_convert(f"hf:{directory}", tmp_path / "workdir")
    line = str(error.value)
    assert words in line and "\n" not in line and str(directory) in line
    assert not (tmp_path / "workdir" / "checkpoints" / "0").exists()


def test_keys_that_are_off_or_of_no_effect_pass(tmp_path):
    directory = changed(
        "qwen3",
        tmp_path,
        some_feature=None,
        other_feature=False,
        temperature=0.7,
        use_sliding_window=False,
        max_window_layers=28,
    )
    assert config_of(directory).model.num_hidden_layers == 3


def test_an_mtp_key_without_its_tensors_is_a_model_without(tmp_path):
    """As transformers saves: the key stays, the layer is dropped. The released copies of embedding
    and head may be missing too.
    """

    def without(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    directory = changed("deepseek_v3", tmp_path, without)
    assert config_of(directory).model.num_nextn_predict_layers == 0
    shutil.rmtree(tmp_path / "changed")

    def copies(tensors):
        del (
            tensors["model.layers.3.embed_tokens.weight"],
            tensors["model.layers.3.shared_head.head.weight"],
        )

    directory = changed("deepseek_v3", tmp_path, copies)
    config = config_of(directory)
    assert config.model.num_nextn_predict_layers == 1
    found, expected = (
        load_variables(config.model, one_device(), f"hf:{origin}")
        for origin in (directory, GOLDEN / "deepseek_v3")
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("case", ["deepseek_v3", "qwen3_next"])
def test_experts_in_one_tensor(case, tmp_path):
    """Transformers saves so with save_original_format=False: gate above up, experts stacked. It is
    the same model, and it is written back so.
    """

    def fuse(tensors):
        for layer in {
            name.split(".mlp.experts.")[0] for name in tensors if ".mlp.experts." in name
        }:
            experts = f"{layer}.mlp.experts"
            gate, up, down = (
                np.stack(
                    [
                        tensors.pop(f"{experts}.{expert}.{name}_proj.weight")
                        for expert in range(model(case).moe.num_experts)
                    ]
                )
                for name in ("gate", "up", "down")
            )
            tensors[f"{experts}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
            tensors[f"{experts}.down_proj"] = down

    directory = changed(case, tmp_path, fuse)
    found, expected = (
        load_variables(model(case), one_device(), f"hf:{origin}")
        for origin in (directory, GOLDEN / case)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    run_convert(f"hf:{directory}", tmp_path / "workdir")
    run_convert(tmp_path / "workdir", f"hf:{tmp_path / 'back'}")
    before, after = TensorFiles(directory), TensorFiles(tmp_path / "back")
    assert set(before.tensors) == set(after.tensors) and all(
        before.read(name).tobytes() == after.read(name).tobytes() for name in before.tensors
    )


def test_what_no_architecture_expresses_is_one_line():
    """It names every field, not the first alone."""
    with pytest.raises(UserError) as error:
        config_json(tiny.MODEL, "float32")
    line = str(error.value)
    for words in (
        "model.canon_kernel_size = 3 (must be 0)",
        "model.mtp_input = 'residual' (must be normed)",
        "model.mla.gate = 'element' (must be none)",
        "DeepseekV32ForCausalLM cannot express it",
    ):
        assert words in line
    assert line.startswith("; ".join(export_refusals(tiny.MODEL))) and "\n" not in line
    mixed = tiny.model_config(
        layer_types=("mla", "gqa"),
        norm="zero_centred",
        canon_kernel_size=0,
        num_nextn_predict_layers=0,
    )
    with pytest.raises(UserError, match=r"model.layer_types = \('mla', 'gqa'\)"):
        config_json(mixed, "float32")
