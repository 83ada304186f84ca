"""One request to a server, by the standard library: its answer, or why there is none."""

import contextlib
import dataclasses
import http.client
import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from errors import UserError, shortened

KEY = "ATHANOR_SERVER_KEY"  # the environment variable that has a server's key, if it wants one
UNAVAILABLE = (429, 502, 503, 504)  # statuses of a server that cannot answer at the moment
CHUNK = 1 << 16  # bytes of an answer that are read at a time

# (method, path, what is sent as JSON or None) -> what is answered as JSON; None of an empty body.
Ask = Callable[[str, str, Any], Any]


class Unanswered(Exception):
    """A request that has no answer, and may have one when it is made again.

    Attributes:
      gone: whether the server may have died, and be back with the weights that it began with.
    """

    def __init__(self, reason: str, *, gone: bool):
        super().__init__(reason)
        self.gone = gone


class Refused(UserError):
    """A request that the server does not do.

    Attributes:
      status: that of HTTP.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a server is.

    Attributes:
      url: as a person wrote it; a path behind the host stands before that of each request, but for
        /v1, which some write and which the requests have.
      timeout: seconds that an answer may take.
    """

    url: str
    timeout: float

    def connection(self) -> http.client.HTTPConnection:
        """Returns a connection that is not open yet."""
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return kind(parts.hostname or "", parts.port, timeout=self.timeout)

    def path(self, path: str) -> str:
        """Returns the path of a request, with what stands before it."""
        return urlsplit(self.url).path.rstrip("/").removesuffix("/v1") + path


class Request:
    """A request to a server, which another thread than the one that waits may give up."""

    def __init__(self, address: Address, method: str, path: str, body: Any = None):
        self._address, self._method, self._path, self._body = address, method, path, body
        self._socket: socket.socket | None = None
        self._given_up = False

    def give_up(self) -> None:
        """Ends the wait for the answer; a server that sees the connection end stops sampling."""
        self._given_up = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def answer(self) -> Any:
        """Makes the request, and returns its answer, parsed; None where the body is empty.

        Raises:
          Unanswered: nothing answers, in time or at all, or what does is not the server.
          Refused: the server does not do what is asked.
        """
        try:
            status, body = self._exchange()
        except TimeoutError:
            seconds = f"{self._address.timeout:g} s"
            raise Unanswered(f"no answer within {seconds}", gone=True) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Unanswered(shortened(reason), gone=True) from error
        if status in UNAVAILABLE:
            raise Unanswered(f"HTTP {status}, {_said(body)}", gone=status != 429)
        if status != 200:
            where = f"{self._address.url}: {self._method} {self._path}"
            raise Refused(f"{where} is refused with HTTP {status}, {_said(body)}", status)
        if not body.strip():
            return None
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise Unanswered(f"an answer that is not JSON, {_said(body)}", gone=True) from None

    def _exchange(self) -> tuple[int, bytes]:
        """Returns the status and the body of the answer. Raises OSError or HTTPException."""
        end = time.monotonic() + self._address.timeout
        headers = {"Accept": "application/json", "Connection": "close"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        sent = None
        if self._body is not None:
            sent, headers["Content-Type"] = json.dumps(self._body).encode(), "application/json"
        connection = self._address.connection()
        try:
            connection.connect()
            self._socket = opened = connection.sock
            if self._given_up:
                raise ConnectionAbortedError("given up")
            path = self._address.path(self._path)
            connection.request(self._method, path, body=sent, headers=headers)
            response, parts = connection.getresponse(), []
            while not response.isclosed():  # as Python 3.13 has it behind the last byte
                # The timeout of a socket is that of each wait; an answer may come in many parts.
                opened.settimeout(max(end - time.monotonic(), 1e-3))
                if not (part := response.read1(CHUNK)):
                    break
                parts.append(part)
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
            return response.status, b"".join(parts)
        finally:
            connection.close()


def _said(body: bytes) -> str:
    """Returns what the body of an error says, in a few words."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        while isinstance(found, dict):
            found = next(
                found[name] for name in ("error", "message", "detail", "object") if name in found
            )
        text = str(found)
    except (ValueError, RecursionError, StopIteration):
        pass
    return shortened(" ".join(text.split()), 300) or "which says nothing"
