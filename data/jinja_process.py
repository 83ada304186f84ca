"""Chat templates rendered in a process of their own, with a bound in time and memory.

A template is a program that came with a download: it may loop without an end or fill the memory.
The process is started with the first template and serves all of them, one request at a time. Each
request and each answer is a pickle behind its length in 8 bytes.
"""

import atexit
import contextlib
import io
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 10.0  # for one rendering; a long conversation takes milliseconds
START_SECONDS = 120.0  # until the process is there, on a machine that has other things to do
MEMORY = 2 * 2**30  # bytes of address space of the process
LONGEST = 2**24  # characters of a rendering


class Refused(Exception):
    """A template, or what it does with a conversation, is wrong; the message says why.

    Attributes:
      by_conversation: whether another conversation may be accepted.
    """

    def __init__(self, reason: str, *, by_conversation: bool):
        super().__init__(reason)
        self.by_conversation = by_conversation


class Answer(NamedTuple):
    """What the process says: a value, or why there is none, as the fields of `Refused`."""

    value: Any
    reason: str = ""
    by_conversation: bool = False


class JinjaProcess:
    """The process, seen from here. Threads may share it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)

    def ask(self, request: tuple[Any, ...]) -> Any:
        """Returns the answer to ("render", source, context) or ("names", source).

        Raises:
          Refused: the template is wrong, refuses, or goes beyond a bound.
        """
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                assert self._process is not None
                _write(self._process.stdin, request)
                answer = self._read(SECONDS)
            except RecursionError:
                reason = "the conversation is nested too deeply"
                raise Refused(reason, by_conversation=True) from None
            except TimeoutError:
                self.stop()
                reason = f"the template takes more than {SECONDS:g} seconds for a conversation"
                raise Refused(reason, by_conversation=False) from None
            except (OSError, EOFError, pickle.UnpicklingError):
                self.stop()
                reason = f"the template takes more than {MEMORY // 2**30} GiB of memory, or crashes"
                raise Refused(reason, by_conversation=False) from None
        if answer.reason:
            raise Refused(answer.reason, by_conversation=answer.by_conversation)
        return answer.value

    def stop(self) -> None:
        """Ends the process, if there is one; the next request starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        root = str(Path(__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from data.jinja_process import serve; serve()"],
            env={**os.environ, "PYTHONPATH": root},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us
        )
        self._read(START_SECONDS)

    def _read(self, seconds: float) -> Answer:
        """Reads an answer. Raises TimeoutError, or EOFError if the process has ended."""
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            raise TimeoutError
        return _read(self._process.stdout)


def serve() -> None:
    """Answers requests from standard input on standard output until it ends."""
    import resource

    with contextlib.suppress(ValueError, OSError):  # not on every system
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    sys.stdout = sys.stderr
    _write(target, Answer("ready"))
    while True:
        try:
            request = _read(source)
        except EOFError:
            return
        signal.alarm(2 * int(SECONDS))  # ends this process where nobody is left to do so
        answer = _answer(request)
        signal.alarm(0)
        _write(target, answer)


def _answer(request: tuple[Any, ...]) -> Answer:
    import jinja2

    try:
        return Answer(_done(*request))
    except jinja2.TemplateSyntaxError as error:
        return Answer(None, f"line {error.lineno} of the chat template: {error.message}")
    except RecursionError:
        return Answer(None, "the template is nested too deeply, or calls itself without an end")
    except MemoryError:
        return Answer(None, f"the template takes more than {MEMORY // 2**30} GiB of memory")
    except Exception as error:  # the program may raise anything that Python does
        return Answer(None, " ".join(str(error).split()) or type(error).__name__, True)


def _done(what: str, source: str, context: Mapping[str, Any] | None = None) -> Any:
    import jinja2.meta

    from data.chat_jinja import compiled, jinja_environment

    program = compiled(source)
    if what == "names":
        return jinja2.meta.find_undeclared_variables(jinja_environment().parse(source))
    parts, length = io.StringIO(), 0
    for part in program.generate(context or {}):
        length += parts.write(part)
        if length > LONGEST:
            raise ValueError(f"the template writes more than {LONGEST:,} characters")
    text = parts.getvalue()
    text.encode()  # half a character, which JSON can write, is no text
    return text


def _write(stream: Any, value: Any) -> None:
    content = pickle.dumps(value)
    stream.write(len(content).to_bytes(8, "little") + content)
    stream.flush()


def _read(stream: Any) -> Any:
    """Returns the next value. Raises EOFError if there is none."""
    length = stream.read(8)
    if len(length) < 8:
        raise EOFError
    return pickle.loads(stream.read(int.from_bytes(length, "little")))


JINJA = JinjaProcess()
