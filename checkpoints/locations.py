"""Where a model comes from: a workdir of a run, or `hf:DIR`."""

from pathlib import Path

from errors import UserError

HF = "hf:"


# of a workdir: what a Hugging Face checkpoint has besides tensors, see checkpoints/hf/metadata.py
RECORD = "hf"


def hf_directory(path: str | Path) -> Path | None:
    """DIR of `hf:DIR`; None for anything else. Raises UserError if there is no such directory."""
    if not str(path).startswith(HF):
        return None
    directory = Path(str(path)[len(HF) :])
    if not directory.is_dir():
        raise UserError(f"{path}: no such directory")
    return directory


def run_directory(path: str) -> Path:
    """The workdir that a path to a workdir, its checkpoints or one of them belongs to."""
    directory = Path(path)
    if directory.name.isdigit():
        directory = directory.parent
    return directory.parent if directory.name == "checkpoints" else directory
