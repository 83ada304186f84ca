"""A little server of a model that speaks vLLM's and SGLang's words, over our own engine.

It reads ids and returns ids and log-probs, really loads the checkpoints that it is told of, and
fails in the ways that it is asked to. Its answers have the fields that vLLM 0.32.0 and SGLang
0.5.23 give them.
"""

import collections
import contextlib
import dataclasses
import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data.tokenizer import Tokenizer
from errors import UserError
from model.config import ModelConfig
from rl.config import SamplingConfig
from rl.engine import Engine
from rl.request import Prompt
from rl.trajectory import Trajectory
from tests import tiny
from tests.server_words import (
    completion_sglang,
    completion_vllm,
    sglang,
    told_sglang,
    told_vllm,
    vllm,
)
from train.restore import load_variables


@dataclasses.dataclass
class ModelServer:
    """A model in a directory, served.

    Attributes:
      api: "vllm" or "sglang".
      origin: the directory of the checkpoint that it begins with, and has again after a restart.
      tokenizer, sampling, rows: the engine has as many rows, and capacity, as the run's.
      faults: what goes wrong with the next completions that are asked for, one after another: "" is
        nothing.
      temperature_told: whether log-probs are those at the temperature.
      longest: the sequences that it says it serves.
      loaded: the directories that it was told of.
      most: how many completions were under way at a time.
    """

    api: str
    origin: Path
    model: ModelConfig
    mesh: Mesh
    tokenizer: Tokenizer
    sampling: SamplingConfig
    rows: int = 4
    port: int = 0
    faults: collections.deque[str] = dataclasses.field(default_factory=collections.deque)
    temperature_told: bool = True
    longest: int = 4_096
    loaded: list[str] = dataclasses.field(default_factory=list)
    asked: list[dict] = dataclasses.field(default_factory=list)
    keys: list[str | None] = dataclasses.field(default_factory=list)
    most: int = 0
    live: bool = False
    change: threading.Condition = dataclasses.field(default_factory=threading.Condition)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begins, or begins again at the same port with the weights of its origin."""
        self.variables = load_variables(self.model, self.mesh, f"hf:{self.origin}")
        self.under_way: dict[int, queue.SimpleQueue] = {}
        self.inbox: collections.deque = collections.deque()
        self.version, self.aborts = "default", 0
        self.listener = _Listener(("127.0.0.1", self.port), _Handler)
        self.listener.owner, self.port = self, self.listener.server_port
        self.live = True
        self.threads = [
            threading.Thread(target=self._sample, daemon=True),
            threading.Thread(target=self.listener.serve_forever, args=(0.01,), daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Dies, with all that is under way."""
        with self.change:
            self.live = False
            self.change.notify_all()
        self.listener.shutdown()
        self.listener.server_close()
        self.threads[0].join()
        for answers in (*self.under_way.values(), *(each[-1] for each in self.inbox)):
            answers.put(None)

    @contextlib.contextmanager
    def running(self) -> Iterator["ModelServer"]:
        """Serves while the caller's block runs."""
        self.start()
        try:
            yield self
        finally:
            if self.live:
                self.stop()

    def engine(self, temperature: float) -> Engine:
        sampling = dataclasses.replace(self.sampling, temperature=temperature, server="")
        return Engine(self.model, self.mesh, sampling, rows=self.rows, steps=3)

    def _sample(self) -> None:
        """Samples what is asked for, in a thread of its own."""
        number, busy, aborts = 0, False, self.aborts
        engine = temperature = variables = None
        while True:
            with self.change:
                while self.live and not (self.inbox or busy):
                    self.change.wait()
                if not self.live:
                    return
                aborts = aborts if busy else self.aborts  # there was nothing to end
                asked, self.inbox = self.inbox, collections.deque()
            for prompt, wanted, answers in asked:
                if engine is None or wanted != temperature:
                    assert not busy
                    engine, temperature, variables = self.engine(wanted), wanted, None
                try:
                    engine.submit(dataclasses.replace(prompt, group=number))
                except UserError as error:
                    answers.put(error)
                    continue
                self.under_way[number], number = answers, number + 1
                self.most = max(self.most, len(self.under_way))
            assert engine is not None
            if variables is not self.variables:
                variables = self.variables
                engine.load(variables)
            ended = engine.step()
            if aborts != self.aborts:
                aborts = self.aborts
                ended += engine.take_out()
            for trajectory in ended:
                self.under_way.pop(trajectory.group).put(trajectory)
            busy = engine.busy

    def complete(self, tokens: list[int], told: dict[str, Any]) -> Trajectory | UserError | None:
        """Returns what is sampled after a prompt, or what is wrong with it; None where the server
        dies meanwhile.
        """
        words = np.frombuffer((told["seed"] or 0).to_bytes(8, "big", signed=True), ">u4")
        keys_12 = words.astype(np.uint32)[None]
        prompt = Prompt(tokens, keys_12, told["most"], tuple(told["stops"]))
        answers: queue.SimpleQueue = queue.SimpleQueue()
        with self.change:
            if not self.live:
                return None
            self.inbox.append((prompt, told["temperature"], answers))
            self.change.notify_all()
        return answers.get()

    def reload(self, directory: str) -> None:
        self.loaded.append(directory)
        self.variables = load_variables(self.model, self.mesh, f"hf:{directory}")

    def likeliest(self, tokens: list[int], temperature: float, count: int) -> dict[int, float]:
        """Returns log-probs of the likeliest ids after a prompt."""
        length = len(tokens)
        row = {
            "tokens": np.asarray([tokens], np.int32),
            "positions": np.arange(length)[None],
            "segments": np.ones((1, length), np.int32),
        }
        logits_V = tiny.forward(self.model, self.variables, row, "dense")["logits_BTV"][0, -1]
        told = temperature if self.temperature_told else 1.0
        logprobs_V = np.asarray(jax.nn.log_softmax(logits_V / told))
        return {int(i): float(logprobs_V[i]) for i in np.argsort(-logprobs_V)[:count]}


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    owner: ModelServer

    def handle_error(self, request, client_address):
        """A client that goes away is none of the tests' errors."""


class _Handler(BaseHTTPRequestHandler):
    server: _Listener

    def log_message(self, format, *args):
        """Says nothing."""

    def do_GET(self) -> None:
        owner = self.server.owner
        found = {
            "/v1/models": {"data": [{"id": "served", "max_model_len": owner.longest}]},
            "/weight_info" if owner.api == "vllm" else "/model_info": {
                "weight_version": owner.version
            },
        }.get(self.path)
        self._answer(404 if found is None else 200, found or {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        owner = self.server.owner
        words = vllm if owner.api == "vllm" else sglang
        if self.path == "/tokenize":
            ids = owner.tokenizer.encode_rendered(body["prompt"])
            self._answer(200, {"tokens": ids, "count": len(ids), "max_model_len": owner.longest})
        elif self.path == ("/v1/completions" if owner.api == "vllm" else "/generate"):
            owner.asked.append(body)
            owner.keys.append(self.headers.get("Authorization"))
            self._complete(body)
        else:
            self._answer(*words(owner, self.path, body))

    def _complete(self, body: dict[str, Any]) -> None:
        owner = self.server.owner
        fault = owner.faults.popleft() if owner.faults else ""
        if fault.isdigit():
            return self._answer(int(fault), {"error": {"message": "not now"}})
        if fault == "hang":
            time.sleep(1.5)
        if fault in ("reset", "hang"):
            return self._reset()
        if fault == "die":
            threading.Thread(target=owner.stop, daemon=True).start()
        if fault == "die and come back":

            def again() -> None:
                owner.stop()
                owner.start()

            threading.Thread(target=again, daemon=True).start()
        of_vllm = owner.api == "vllm"
        told = told_vllm(body) if of_vllm else told_sglang(body)
        trajectory = owner.complete(told["tokens"], told)
        if trajectory is None:
            return self._reset()
        if isinstance(trajectory, UserError):
            return self._answer(400, {"error": {"message": str(trajectory)}})
        found = (completion_vllm if of_vllm else completion_sglang)(owner, told, trajectory, fault)
        if fault == "garbage":
            found = json.dumps(found)[:-20]
        if fault == "cut":
            return self._cut(json.dumps(found).encode())
        return self._answer(200, found)

    def _answer(self, status: int, found: Any) -> None:
        text = found if isinstance(found, str) else "" if found is None else json.dumps(found)
        sent = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def _cut(self, sent: bytes) -> None:
        """Ends in the middle of an answer."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent[: len(sent) // 2])
        self.close_connection = True

    def _reset(self) -> None:
        """Ends the connection as a process that dies does."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
