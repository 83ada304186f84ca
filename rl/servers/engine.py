"""What samples where a server does: requests under way, and what came of them.

It has the methods of `rl.engine.Engine` (`rl.engines.AnyEngine`). Each completion is a request, of
token ids, whose answer a thread waits for. What fails is asked again from where it began: with the
same seed, so that it would come to the same.
"""

import collections
import contextlib
import dataclasses
import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from errors import UserError
from rl.config import SamplingConfig
from rl.request import Counts, Part, Prompt, Row, Turn, check_prompt, check_turn
from rl.servers.api import Answer, Wanted
from rl.servers.http import Refused, Request, Unanswered
from rl.servers.server import Server
from rl.trajectory import STOP, UNFINISHED, Role, Trajectory

ABORT_EVERY = 1.0  # seconds after which completions that go on all the same are told to end again
Came = Answer | Exception  # of a request


@dataclasses.dataclass(frozen=True)
class Asked:
    """A completion under way, and the request for it."""

    row: Row
    request: Request


class ServerEngine:
    """Completions of prompts by a server; its methods do what those of `rl.engine.Engine` do.

    Args:
      server: that samples; `rl.servers.connect` has checked it.
      sampling: the temperature, and how many tokens there may be.
      vocab_size: every id is below it.
      requests: how many are under way at a time.
    """

    outside = True

    def __init__(self, server: Server, sampling: SamplingConfig, vocab_size: int, *, requests: int):
        self._server, self._sampling, self._vocab_size = server, sampling, vocab_size
        self._requests = requests
        self.capacity = sampling.max_prompt_tokens + sampling.max_new_tokens
        self.counts = Counts()
        self._version = 0
        self._waiting: collections.deque[Row] = collections.deque()
        self._ended: list[Trajectory] = []
        self._asked: dict[int, Asked] = {}
        self._number = itertools.count()
        self._answers: queue.SimpleQueue[tuple[int, Came]] = queue.SimpleQueue()
        self._failures: collections.Counter[Row] = collections.Counter()

    def load(self, variables: dict, version: int = 0, *, read_again: bool = False) -> None:
        """Hands the variables over; completions under way go on with them, read again."""
        self._withdraw()
        self._server.hand_over(variables)
        self._version = version

    @contextlib.contextmanager
    def loaded(
        self, variables: dict, version: int = 0, *, recording: bool = True
    ) -> Iterator[None]:
        """Loads variables for the time being; what was begun meanwhile is let go of at the end."""
        self._withdraw()
        before = self._waiting, self._ended
        self._waiting, self._ended = collections.deque(), []
        try:
            self.load(variables, version)
            yield
        finally:
            self._give_up()
            self._waiting, self._ended = before

    def unload(self) -> None:
        """Lets nothing be under way until others are loaded."""
        self._withdraw()

    def take_out(self) -> list[Trajectory]:
        """Returns what completions have so far, of those that ended since the last `step` too."""
        self._withdraw()
        ended, self._ended = self._ended, []
        unfinished = [row.trajectory(UNFINISHED) for row in self._waiting]
        self._waiting.clear()
        return ended + unfinished

    def submit(self, prompt: Prompt, begun: Mapping[int, Trajectory] | None = None) -> None:
        """Adds a prompt to those that wait, see `rl.engine.Engine.submit`.

        Raises UserError for a prompt that is too long, or that a server cannot complete.
        """
        check_prompt(prompt, self._sampling)
        _check_told(prompt)
        begun = begun or {}
        for g in range(len(prompt.keys_G2)):
            if g not in begun:
                self._waiting.append(Row.begin(prompt, g))
            elif begun[g].ended == UNFINISHED:
                self._waiting.append(Row.resume(prompt, begun[g]))

    def run(
        self, prompts: Iterable[Prompt] = (), most_tokens: int | None = None
    ) -> Iterator[Trajectory]:
        """Yields completions as they end, see `rl.engine.Engine.run`."""
        for prompt in prompts:
            self.submit(prompt)
        end = None if most_tokens is None else self.counts.sampled + most_tokens
        while self.busy and (end is None or self.counts.sampled < end):
            yield from self.step()

    @property
    def busy(self) -> bool:
        """Whether any completion waits, is under way, or has ended and was not returned."""
        return bool(self._waiting or self._asked or self._ended)

    def step(self) -> list[Trajectory]:
        """Asks for as many completions as may be under way, and waits until one of them ends.

        Raises UserError: the server refuses, stays away, or answers what cannot be.
        """
        if not self._ended:
            self._ask()
        if self._asked and not self._ended:
            failed = self._collect(self._answers.get())
            with contextlib.suppress(queue.Empty):
                while True:
                    failed += self._collect(self._answers.get_nowait())
            if failed:
                self._again(failed)
        ended, self._ended = self._ended, []
        return ended

    def _ask(self) -> None:
        while self._waiting and len(self._asked) < self._requests:
            row = self._waiting.popleft()
            tokens = row.tokens
            wanted = Wanted(
                tokens.tolist(),
                row.left,
                row.stops,
                self._sampling.temperature,
                seed_of(row, len(tokens)) if self._sampling.server_seeds else None,
            )
            path, body = self._server.api.request(self._server.model, wanted)
            number, request = next(self._number), Request(self._server.address, "POST", path, body)
            self._asked[number] = Asked(row, request)
            self.counts.read += len(tokens)
            wait = threading.Thread(target=self._wait, args=(number, request), daemon=True)
            wait.start()

    def _wait(self, number: int, request: Request) -> None:
        """Waits for an answer, in a thread of its own, and passes on what comes."""
        try:
            came: Came = self._server.api.answer(request.answer())
        except Refused as error:
            # A server whose engine has died says so, and ends.
            came = Unanswered(str(error), gone=True) if error.status >= 500 else error
        except Exception as error:
            came = error
        self._answers.put((number, came))

    def _collect(self, answered: tuple[int, Came]) -> list[tuple[Row, Unanswered]]:
        """Takes what came of a request; returns the row, where it is to be asked again."""
        number, came = answered
        asked = self._asked.pop(number, None)
        if asked is None:  # it was given up
            return []
        if isinstance(came, Answer) and came.version not in (None, self._server.version):
            came = Unanswered("it has other weights than it was given", gone=True)
        if isinstance(came, Unanswered):
            self._waiting.appendleft(asked.row)
            return [(asked.row, came)]
        if isinstance(came, UserError):
            raise self._server.named(came)
        if isinstance(came, Exception):
            raise came
        self._failures.pop(asked.row, None)
        self._take(asked.row, came)
        return []

    def _again(self, failed: list[tuple[Row, Unanswered]]) -> None:
        """Waits, and gives a server that may have died its weights again, before more is asked.

        What is under way then is waited for: an answer that began after a death that nobody has
        seen yet would be by other weights.
        """
        error = next((error for _, error in failed if error.gone), failed[0][1])
        while error.gone and self._asked:
            failed += self._collect(self._answers.get())
        for row, _ in failed:
            self._failures[row] += 1
        failures = max(self._failures[row] for row, _ in failed)
        if error.gone:
            self._server.doubted = True
            self._server.restore(error, failures)
        else:
            self._server.wait(error, failures)

    def _take(self, row: Row, answer: Answer) -> None:
        """Adds what was sampled to a row, which then ended, or goes on."""
        count = len(answer.tokens)
        self._check(row, answer)
        part = Part(
            answer.tokens,
            np.full(count, Role.MODEL, np.int8),
            answer.logprobs,
            np.zeros(count, np.float32),
            np.full(count, self._version, np.int32),
        )
        if count:
            row.add(part)
        self.counts.sampled += count
        self.counts.passes += count
        halted = row.halted()
        if row.halts and (keep := row.halts(row.sampled)) is not None:
            self.counts.sampled -= row.in_turn - keep
            row.take_back(row.in_turn - keep)
            halted = STOP
        if halted is None:
            if answer.ended != "abort":
                raise UserError(
                    f"{self._server.url}: a completion ended ({answer.ended}) with id "
                    f"{row.tokens[-1]} after {row.in_turn} tokens, {row.left} before its end, and "
                    f"its stops are {list(row.stops)}: the server has other stops, or less room"
                )
            self._waiting.appendleft(row)
        elif not self._goes_on(row, halted):
            self._ended.append(row.trajectory(halted))

    def _check(self, row: Row, answer: Answer) -> None:
        """Raises UserError if an answer is none to what was asked."""
        count, wrong = len(answer.tokens), ""
        if count > row.left:
            wrong = f"has {count:,} tokens where {row.left:,} were asked for"
        elif count and int(np.max(answer.tokens)) >= self._vocab_size:
            wrong = f"has id {int(np.max(answer.tokens))}, and there are {self._vocab_size:,}"
        elif np.isin(answer.tokens[:-1], row.stops).any():
            wrong = f"goes on behind a stop of {list(row.stops)}"
        if wrong:
            raise UserError(f"{self._server.url}: a completion {wrong}; is it the run's model?")

    def _goes_on(self, row: Row, halted: str) -> bool:
        """Gives a row that halted its next turn, and tells whether it has one."""
        turn = row.prompt.reply(row.trajectory(halted)) if row.prompt.reply else None
        if turn is None:
            return False
        check_turn(turn, row)
        _check_told(turn)
        room = self.capacity - (len(row.tokens) - turn.take_back) - len(turn.tokens)
        if room < 1:
            return False
        row.turn(dataclasses.replace(turn, max_new_tokens=min(turn.max_new_tokens, room)))
        self._waiting.appendleft(row)
        return True

    def _withdraw(self) -> None:
        """Lets the server end what is under way; rows wait with what they have by then."""
        while self._asked:
            if self._answers.empty():
                # Where nothing answers this, nothing answers those either, and they end so.
                with contextlib.suppress(Unanswered):
                    self._server.api.abort(self._server.ask_once)
            with contextlib.suppress(queue.Empty):
                failed = self._collect(self._answers.get(timeout=ABORT_EVERY))
                self._server.doubted |= any(error.gone for _, error in failed)

    def _give_up(self) -> None:
        """Lets go of what is under way, answered or not."""
        given_up, self._asked = self._asked, {}
        for asked in given_up.values():
            asked.request.give_up()
        self._failures.clear()


def seed_of(row: Row, length: int) -> int:
    """Returns the seed that the next tokens of a row are drawn with, a signed number of 64 bits.

    It is the completion's key where nothing follows the prompt, and one of the key and of how many
    tokens there are where something does: a server that counts from where a request begins would
    otherwise draw with the same random numbers twice.
    """
    key = row.prompt.keys_G2[row.sample]
    if length == len(row.prompt.tokens):
        words = np.asarray(key, np.uint32)
    else:
        words = np.random.SeedSequence([*map(int, key), length]).generate_state(2, np.uint32)
    return int.from_bytes(words.astype(">u4").tobytes(), "big", signed=True)


def _check_told(asked: Prompt | Turn) -> None:
    """Raises UserError for what cannot be told a server, which would sample something else."""
    if asked.forbidden:
        raise UserError(
            "a prompt forbids ids: a server's log-probs are then not those of what it draws from; "
            "it needs the engine of this process (sampling.server = '')"
        )
    if isinstance(asked, Prompt) and asked.allowed is not None:
        raise UserError(
            "a prompt asks which ids may follow, token by token, as no server does; it needs the "
            "engine of this process (sampling.server = '')"
        )
