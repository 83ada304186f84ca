"""launch.convert on the golden checkpoints: there and back to the bit, stopped and resumed, and
what is wrong with a checkpoint in one line.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoints.hf.checkpoint import HFCheckpoint
from checkpoints.hf.config import config_json, model_fields
from checkpoints.hf.safetensors import TensorFiles
from checkpoints.hf.safetensors_writer import TensorWriter
from checkpoints.streamed import StreamedWriter
from errors import UserError
from experiment.config_files import base_config_from, with_checkpoint_fields
from experiment.schema import parse
from experiment.workdir import recorded_config
from launch import convert
from model.mesh import MeshConfig
from model.sharding import make_mesh
from tests.model.test_golden import CASES, GOLDEN, model
from train.restore import load_variables

ONE = MeshConfig(data=1, fsdp=1, expert=1, tensor=1)


def one_device():
    return make_mesh(ONE, jax.devices()[:1])


def there_and_back(case: str, directory: Path, dtype: str = "") -> tuple[Path, Path]:
    workdir, back = directory / "workdir", directory / "back"
    convert.run(to=str(workdir), dtype=dtype, **{"from": f"hf:{GOLDEN / case}"})
    convert.run(to=f"hf:{back}", dtype="", **{"from": str(workdir)})
    return workdir, back


def copy_of(case: str, directory: Path, change=lambda tensors: None, **config) -> Path:
    """A golden checkpoint with its tensors (name -> array) or its config changed; a key given as
    None is dropped.
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
    (target / "config.json").write_text(
        json.dumps(
            {name: value for name, value in keys.items() if name not in config or value is not None}
        )
    )
    return target


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_the_same(case, tmp_path):
    """Every tensor bit by bit in the type it had, and every other file. FP8 comes back as what it
    stands for, in float32, and config.json says so.
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
def test_a_model_describes_itself(case):
    """The config.json written for a model that came from nowhere reads as the same model."""
    keys = config_json(model(case), "float32")
    directory = GOLDEN / case
    names = TensorFiles(directory).tensors
    target = json.loads(json.dumps(keys))
    expected = model_fields(directory, names) | {"dtype": "float32"}
    found = fields_of(target, names)
    for name in expected:
        assert (
            found[name] == pytest.approx(expected[name], rel=1e-12)
            if isinstance(expected[name], float)
            else found[name] == expected[name]
        ), name


def fields_of(keys: dict, names) -> dict:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(keys))
        return model_fields(Path(directory), names)


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
    """Stopped in the middle of either way; the same command goes on, writes no block twice, and the
    result is the same.
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
        convert.run(to=str(tmp_path / "workdir"), dtype="", **{"from": source})
    with pytest.raises(UserError, match="no checkpoint there"):
        load_variables(model(case), one_device(), tmp_path / "workdir")
    monkeypatch.undo()
    first = len(written[StreamedWriter])
    stop_after(StreamedWriter, 10_000)
    convert.run(to=str(tmp_path / "workdir"), dtype="", **{"from": source})
    # What was under way when it stopped is written again, and nothing else.
    assert len(written[StreamedWriter]) - first < len(TensorFiles(GOLDEN / case).tensors) + 20

    monkeypatch.setattr("checkpoints.convert.SHARD_BYTES", 60_000)
    stop_after(TensorWriter, 50)
    with pytest.raises(KeyboardInterrupt):
        convert.run(to=f"hf:{tmp_path / 'back'}", dtype="", **{"from": str(tmp_path / "workdir")})
    assert not (tmp_path / "back" / "config.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr("checkpoints.convert.SHARD_BYTES", 60_000)
    convert.run(to=f"hf:{tmp_path / 'back'}", dtype="", **{"from": str(tmp_path / "workdir")})
    before, after = TensorFiles(GOLDEN / case), TensorFiles(tmp_path / "back")
    assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before.tensors)


def broken(tensors: dict, name: str, change) -> None:
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
    directory = copy_of(case, tmp_path, **change)
    with pytest.raises(UserError) as error:
        convert.run(to=str(tmp_path / "workdir"), dtype="", **{"from": f"hf:{directory}"})
    assert (
        words in str(error.value)
        and "\n" not in str(error.value)
        and str(directory) in str(error.value)
    )
    assert not (tmp_path / "workdir" / "checkpoints" / "0").exists()


def test_keys_that_are_off_or_of_no_effect_pass(tmp_path):
    directory = copy_of(
        "qwen3",
        tmp_path,
        some_feature=None,
        other_feature=False,
        temperature=0.7,
        use_sliding_window=False,
        max_window_layers=28,
    )
    assert (
        with_checkpoint_fields(base_config_from(f"hf:{directory}"), ()).model.num_hidden_layers == 3
    )


def test_an_mtp_key_without_its_tensors_is_a_model_without(tmp_path):
    """As transformers saves: the key stays, the layer is dropped. The released copies of embedding
    and head may be missing too.
    """

    def without(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    assert (
        parse(
            with_checkpoint_fields(
                base_config_from(f"hf:{copy_of('deepseek_v3', tmp_path, without)}"), ()
            )
        ).model.num_nextn_predict_layers
        == 0
    )
    shutil.rmtree(tmp_path / "changed")

    def copies(tensors):
        del (
            tensors["model.layers.3.embed_tokens.weight"],
            tensors["model.layers.3.shared_head.head.weight"],
        )

    directory = copy_of("deepseek_v3", tmp_path, copies)
    config = parse(with_checkpoint_fields(base_config_from(f"hf:{directory}"), ()))
    assert config.model.num_nextn_predict_layers == 1
    found, expected = (
        load_variables(config.model, one_device(), f"hf:{origin}")
        for origin in (directory, GOLDEN / "deepseek_v3")
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("case", ["deepseek_v3", "qwen3_next"])
def test_experts_in_one_tensor(case, tmp_path):
    """As transformers saves with save_original_format=False: gate above up, experts stacked. The
    same model; and written back so.
    """

    def fuse(tensors):
        for layer in {
            name.split(".mlp.experts.")[0] for name in tensors if ".mlp.experts." in name
        }:
            of = [
                [
                    tensors.pop(f"{layer}.mlp.experts.{e}.{name}_proj.weight")
                    for e in range(model(case).moe.num_experts)
                ]
                for name in ("gate", "up", "down")
            ]
            tensors[f"{layer}.mlp.experts.gate_up_proj"] = np.concatenate(
                [np.stack(of[0]), np.stack(of[1])], axis=1
            )
            tensors[f"{layer}.mlp.experts.down_proj"] = np.stack(of[2])

    directory = copy_of(case, tmp_path, fuse)
    found, expected = (
        load_variables(model(case), one_device(), f"hf:{origin}")
        for origin in (directory, GOLDEN / case)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    convert.run(to=str(tmp_path / "workdir"), dtype="", **{"from": f"hf:{directory}"})
    convert.run(to=f"hf:{tmp_path / 'back'}", dtype="", **{"from": str(tmp_path / "workdir")})
    before, after = TensorFiles(directory), TensorFiles(tmp_path / "back")
    assert set(before.tensors) == set(after.tensors) and all(
        before.read(name).tobytes() == after.read(name).tobytes() for name in before.tensors
    )


def test_what_no_architecture_expresses_is_one_line():
    from tests import tiny

    with pytest.raises(
        UserError, match=r"model.canon_kernel_size = 3: DeepseekV32ForCausalLM cannot express it"
    ):
        config_json(tiny.MODEL, "float32")
    with pytest.raises(UserError, match=r"model.layer_types = \('mla', 'gqa'\)"):
        config_json(
            tiny.model_config(
                layer_types=("mla", "gqa"),
                norm="zero_centred",
                canon_kernel_size=0,
                num_nextn_predict_layers=0,
            ),
            "float32",
        )
