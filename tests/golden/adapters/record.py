"""Records what peft makes of adapters over golden checkpoints: of ours, and of its own.

pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2    in an environment of its own
python tests/golden/adapters/record.py

For each case `ours/` is there, written by `write.py`; `saved/` is made here, by peft: random
adapters with rsLoRA's scale, and all experts of a layer in one. golden.npz has the logits of the
checkpoint with either, float32 [B, T, V]: "ours" and "saved".
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

HERE = Path(__file__).parent
TARGETS = {
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"],
    "qwen3_next": ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "v_proj"],
}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
SPREAD = {"lora_A": 0.05, "lora_B": 0.01}


def load(case: str) -> PreTrainedModel:
    """Loads a golden checkpoint in float32, every operation the plain one."""
    return AutoModelForCausalLM.from_pretrained(
        HERE.parent / case,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    ).eval()


def save(case: str) -> None:
    """Makes adapters by peft, and saves them as it does."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=True,
        target_modules=TARGETS[case],
        target_parameters=PARAMETERS,
        alpha_pattern={"o_proj": 2, r".*\.gate_up_proj": 4},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load(case), config)
    for name, parameter in model.named_parameters():
        for factor, spread in SPREAD.items():
            if factor in name:
                torch.nn.init.normal_(parameter, std=spread)
    model.peft_config["default"].base_model_name_or_path = f"../{case}"
    directory = HERE / case / "saved"
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    (directory / "adapter_model.safetensors").chmod(0o644)  # which only its owner reads


def logits(case: str, adapter: Path) -> np.ndarray:
    """Returns the logits of a checkpoint's recorded prompts with adapters."""
    ids = np.load(HERE.parent / case / "golden.npz")["input_ids"]
    model = PeftModel.from_pretrained(load(case), str(adapter)).eval()
    names = set(load_file(adapter / "adapter_model.safetensors"))
    assert names and all(name.startswith("base_model.model.") for name in names)
    with torch.no_grad():
        return model(torch.tensor(ids).long()).logits.numpy()


def main() -> None:
    """Records every case."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for case in TARGETS:
        save(case)
        found: dict[str, Any] = {
            name: logits(case, HERE / case / name) for name in ("ours", "saved")
        }
        base = np.load(HERE.parent / case / "golden.npz")["logits"]
        for name, x in found.items():
            print(f"{case} {name}: logits move by {np.abs(x - base).max():.2f}")
            assert np.abs(x - base).max() > 0.3, "the adapters do nothing"
        np.savez_compressed(HERE / case / "golden.npz", **found)


if __name__ == "__main__":
    main()
