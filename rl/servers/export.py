"""The policy's weights in a directory that a server reads: a Hugging Face checkpoint each time."""

import hashlib
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from checkpoints.convert import ExportSource, check_exports, export_checkpoint
from files import replacing


class Exports:
    """Checkpoints in a directory, of which the newest stays; runs may share the directory.

    What earlier starts of the run have left there is deleted.

    Args:
      directory: where they go.
      workdir: of the run, by which its own are known.
      dtype: of their tensors, "bfloat16" or "float32".
      source: (variables, a name) -> what is written.

    Raises UserError if no architecture of a Hugging Face checkpoint can express the model.
    """

    def __init__(
        self,
        directory: Path,
        workdir: Path,
        dtype: str,
        source: Callable[[dict, str], ExportSource],
    ):
        self._directory, self._source = directory.resolve(), source
        self.dtype = dtype
        whose = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:8]
        self._prefix = f"policy-{whose}-"
        self._start, self._number = uuid.uuid4().hex[:8], 0
        check_exports(source({}, ""), dtype)
        self.keep_only(None)

    def write(self, variables: dict) -> Path:
        """Writes a checkpoint of these variables, which appears when it is whole.

        Its name is one that no other has. Raises UserError if it cannot be written.
        """
        self._number += 1
        path = self._directory / f"{self._prefix}{self._start}-{self._number:06}"
        with replacing(path) as temporary:
            export_checkpoint(self._source(variables, path.name), temporary, self.dtype)
        return path

    def keep_only(self, newest: Path | None) -> None:
        """Deletes the run's other checkpoints, half-written ones too, once a server has this."""
        for pattern in (f"{self._prefix}*", f".{self._prefix}*"):
            for path in self._directory.glob(pattern):
                if path != newest:
                    shutil.rmtree(path, ignore_errors=True)
