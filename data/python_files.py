"""Python files of a person's own, such as `my_rewards.py`: run once, and asked for what they name.

Whatever is wrong in one is a line that says where in the file.
"""

import contextlib
import difflib
import importlib.util
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import UserError

_MODULES: dict[str, types.ModuleType] = {}  # by name, those that have run to their end


def is_attribute(name: str) -> bool:
    """Returns whether a name is of the form `FILE.py:NAME`."""
    path, colon, attribute = name.rpartition(":")
    return bool(colon) and path.endswith(".py") and attribute.isidentifier()


def load_attribute(name: str) -> Any:
    """Returns what `FILE.py:NAME` names, FILE.py from the working directory.

    Raises:
      UserError: no such file, it fails, or it defines no such name.
    """
    path, _, attribute = name.rpartition(":")
    module = load_python_file(path)
    if not hasattr(module, attribute):
        public = [known for known in vars(module) if not known.startswith("_")]
        near = difflib.get_close_matches(attribute, public, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"{path}: defines no {attribute!r}{hint}")
    return getattr(module, attribute)


def load_python_file(path: str) -> types.ModuleType:
    """Runs a Python file, once in a process, and returns its module.

    Raises:
      UserError: no such file, or whatever it raises, with the line.
    """
    if not path.endswith(".py"):
        raise UserError(f"{path}: must be a Python file, NAME.py")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file (looked from {Path.cwd()})")
    file = Path(path).resolve()
    # A module of its own name, in sys.modules, where dataclasses look theirs up.
    name = f"python_file:{file}"
    if name not in _MODULES:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None, "its name ends in .py"
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        with errors_in(path):
            spec.loader.exec_module(module)
        _MODULES[name] = module
    return _MODULES[name]


@contextlib.contextmanager
def errors_in(path: str, about: str = "") -> Iterator[None]:
    """Turns whatever code of a file raises into one line that says where in the file.

    Args:
      path: the file, as the person named it.
      about: what was asked of it, for the end of the line.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        file = Path(path).resolve()
        frames = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).resolve() == file
        ]
        of_syntax = isinstance(error, SyntaxError) and error.lineno
        line = of_syntax or (frames[-1] if frames else 1)
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{path}:{line}: {words}{about}") from error
