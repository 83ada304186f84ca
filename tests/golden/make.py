"""Makes tiny random checkpoints and records what Hugging Face transformers computes from them.

README.md beside this file describes them.

pip install torch transformers          in an environment of its own; CPU is enough
python tests/golden/make.py [CASE ...]  all cases, or some of cases.py's
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpLayer, MtpModel
except ImportError as missing:
    print(
        f"{missing.name} is needed: pip install torch==2.13.0 transformers==5.23.0", file=sys.stderr
    )
    sys.exit(2)

from cases import CASES, Case, draw, prompts
from checkpoint import empty, load, mtp_layer, mtp_tensors, quantise, saved, write
from margins import LEAST, character, margins
from record import golden, greedy, mtp_trace, trace

HERE = Path(__file__).parent
# Keys of a config object that are no defaults: they follow from other keys, or from the library.
DERIVED = ("transformers_version", "id2label", "label2id", "architectures")
DERIVED += (
    "layer_types",
    "mlp_layer_types",
    "model_type",
    "num_local_experts",
    "num_key_value_heads",
)


def build(case: Case, directory: Path) -> torch.Tensor:
    """Writes the checkpoint; returns the drawn model's logits."""
    model = empty(case)
    draw(model, case.seed)
    config, tensors = saved(model)
    if case.dtype is not torch.float32:
        tensors = {
            name: tensor if "e_score_correction_bias" in name else tensor.to(case.dtype)
            for name, tensor in tensors.items()
        }
    if case.fp8:
        tensors = quantise(tensors, case.seed)
    if case.mtp:
        tensors |= mtp_tensors(drawn_mtp(case, model), tensors, model.config.num_hidden_layers)
    write(directory, case.config if case.released else config, tensors, case.shards)
    with torch.no_grad():
        return model(prompts(case)).logits


def drawn_mtp(case: Case, model: transformers.PreTrainedModel) -> MtpLayer:
    """Makes a random MTP module for a model of the case."""
    layer = mtp_layer(model)
    draw(layer, case.seed + 1)
    return layer


def load_mtp(case: Case, model: transformers.PreTrainedModel, directory: Path) -> MtpLayer | None:
    """Returns the MTP module of a case, if it has one.

    DeepSeek-V3's has the weights that transformers itself finds in the checkpoint. Transformers
    reads no module of the other families, so that one is drawn again.
    """
    if not case.mtp:
        return None
    if model.config.model_type == "deepseek_v3":
        return own_mtp(model, directory).layers[0]
    return drawn_mtp(case, model)


def own_mtp(model: transformers.PreTrainedModel, directory: Path) -> MtpModel:
    """Reads DeepSeek-V3's MTP module as transformers does."""
    model.config.name_or_path = str(directory)
    # The class knows of a 61st layer only.
    layer = rf"model\.layers\.{model.config.num_hidden_layers}\."
    model._keys_to_ignore_on_load_unexpected = [layer]
    return MtpModel.from_pretrained(model).eval()


def check(case: Case, directory: Path, drawn: torch.Tensor) -> dict[str, float]:
    """Checks that the files give the recorded values again, and that the case is of use.

    Of use means that nothing hangs on rounding and every expert works. Raises AssertionError.
    """
    recorded = np.load(directory / "golden.npz")
    ids = prompts(case)
    model = load(directory)
    with torch.no_grad():
        again = trace(model, ids)
        assert np.abs(again.logits.numpy() - recorded["logits"]).max() <= 1e-5
        if case.dtype is torch.float32:
            assert np.abs(drawn.numpy() - recorded["logits"]).max() <= 1e-5
        assert np.array_equal(greedy(model, ids, cache=False)[0].numpy(), recorded["greedy"])
        mtp = load_mtp(case, model, directory)
        if mtp is not None:
            check_mtp(model, mtp, again.normed, ids, recorded["mtp_logits"])
            if model.config.model_type == "deepseek_v3":
                whole, positions = own_mtp(model, directory), torch.arange(1, ids.shape[1])[None]
                out = whole.forward_layer(
                    0,
                    again.normed[:, :-1],
                    positions,
                    MtpCache(config=whole.config),
                    input_ids=ids[:, 1:],
                )
                found = whole._project_to_logits(out).numpy()
                assert np.abs(found - recorded["mtp_logits"]).max() <= 1e-5
    tensors = {
        name: tensor
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    own = {
        name
        for name in tensors
        if not any(word in name for word in ("_scale_inv", "e_score_correction_bias", ".indexer."))
    }
    modules = mtp_tensors(mtp, tensors, model.config.num_hidden_layers) if mtp else {}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in modules.items())
    assert own - set(modules) == set(recorded["grad_names"].tolist())
    assert (recorded["grad_norms"] > 0).all(), (
        "a parameter without a gradient: an expert that is never chosen?"
    )
    gaps, facts = margins(model, ids, mtp), character(model, ids)
    assert min(gaps.values()) >= max(LEAST, 10 * facts.get("choice noise", 0.0)), (gaps, facts)
    return gaps | facts


def check_mtp(
    model: transformers.PreTrainedModel,
    mtp: MtpLayer,
    normed: torch.Tensor,
    ids: torch.Tensor,
    recorded: np.ndarray,
) -> None:
    """Checks that an MTP module gives the recorded logits, and that it is causal."""
    found = mtp_trace(model, mtp, normed, ids).logits.numpy()
    assert np.abs(found - recorded).max() <= 1e-5
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % model.config.vocab_size
    changed = np.abs(mtp_trace(model, mtp, normed, other).logits.numpy() - recorded) > 1e-5
    assert not changed[:, :-1].any() and changed[:, -1].any(-1).all(), "the module is not causal"


def make(name: str) -> None:
    """Makes one case in a temporary directory, and moves it into place."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary, name)
        directory.mkdir()
        drawn = build(case, directory)
        model = load(directory)
        recorded: dict[str, Any] = golden(model, prompts(case), load_mtp(case, model, directory))
        np.savez_compressed(directory / "golden.npz", **recorded)
        facts = check(case, directory, drawn)
        size = sum(file.stat().st_size for file in directory.iterdir())
        shutil.rmtree(HERE / name, ignore_errors=True)
        shutil.move(directory, HERE / name)
    print(
        f"{name}: {size / 1e3:.0f} kB; "
        + ", ".join(f"{fact} {value:.2g}" for fact, value in facts.items())
    )


def record_defaults() -> None:
    """Writes what transformers takes for the keys that a config.json lacks, by architecture."""
    models = {"deepseek_v3", "deepseek_v32", "qwen3", "qwen3_moe", "qwen3_next"}
    defaults = {
        model: {
            key: value
            for key, value in transformers.AutoConfig.for_model(model).to_dict().items()
            if key not in DERIVED
        }
        for model in sorted(models)
    }
    text = json.dumps({"transformers": transformers.__version__} | defaults, indent=1)
    (HERE / "defaults.json").write_text(text + "\n")


def main() -> None:
    """Makes the cases that the command line names, or all, and the record of the defaults."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = sys.argv[1:] or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        sys.exit(f"{unknown[0]} is not a case: {', '.join(CASES)}")
    for name in names:
        make(name)
    record_defaults()


if __name__ == "__main__":
    main()
