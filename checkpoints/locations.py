"""Reads the name of a model: the workdir of a run, or `hf:DIR`, a Hugging Face checkpoint."""

from pathlib import Path

from errors import UserError

HF_PREFIX = "hf:"  # the beginning of the name of a Hugging Face checkpoint
PEFT_PREFIX = "peft:"  # of a directory with adapters in peft's format
# The part of a workdir with what a Hugging Face checkpoint has besides tensors, see hf/metadata.py.
HF_RECORD = "hf"
LORA_RECORD = "lora.json"  # what a run with adapters says of them, see lora.py
REFERENCE_RECORD = "reference.json"  # where a run's reference comes from, see train/reference.py


def hf_directory(path: str | Path) -> Path | None:
    """Returns DIR of `hf:DIR`, or None for anything else.

    Raises:
      UserError: there is no such directory.
    """
    if not str(path).startswith(HF_PREFIX):
        return None
    directory = Path(str(path)[len(HF_PREFIX) :])
    if not directory.is_dir():
        raise UserError(f"{path}: no such directory")
    return directory


def run_directory(path: str | Path) -> Path:
    """Returns the workdir that a path to a workdir, its checkpoints or one of them belongs to."""
    directory = Path(path)
    if directory.name.isdigit():
        directory = directory.parent
    return directory.parent if directory.name == "checkpoints" else directory
