"""Sampling with continuous batching: a slot whose row ends takes the next prompt at once.

    engine = Engine(model, mesh, sampling, rows=64)
    engine.load(variables)
    for trajectory in engine.run(prompts):
        ...

This is the host's part: which prompt goes into which slot, and what came out of it. The programs
that it calls are in rl/slots.py. A prompt is read once, whatever the number of its completions; of
a conversation only what is new is read. What a completion samples depends on the weights, its
prompt and its key alone, not on its slot, on the others, or on when it began.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from errors import UserError
from model.config import ModelConfig
from model.sharding import batch_shards
from rl.config import SamplingConfig
from rl.programs import MOST_STEPS, Programs
from rl.records import Recorder
from rl.request import (
    Counts,
    Part,
    Prompt,
    Row,
    allowed_of,
    check_prompt,
    check_turn,
    read_together,
    rules_of,
)
from rl.slots import NOTHING, Sampled
from rl.trajectory import STOP, UNFINISHED, Trajectory
from rl.turns import Unread, next_chunk
from rl.work import Reading, Work
from train.setup import to_host

WIDTHS = tuple(2 * 4**n for n in range(2, 12))  # 32, 128, 512, ...: tokens that prompts are read in
READ_TOKENS = 1_024  # of prompts at a time, at most, or one prompt


class Engine:
    """Slots of a model on a mesh, and the prompts that wait for one.

    Args:
      model: its vocabulary is filled in.
      sampling: temperature and the like; max_prompt_tokens + max_new_tokens is what a slot holds.
      rows: the number of slots, rounded up to divide over the mesh.
      group_size: completions that most prompts have, by which as many prompts are read at a time
        as fill the slots.
      steps: tokens that are sampled before the host looks, at most MOST_STEPS.
      pad: an id of the vocabulary, to fill rows with.
      record: which of `rl.records.RECORDS` trajectories have, for a replay.

    Raises UserError for a record that there is not.
    """

    def __init__(
        self,
        model: ModelConfig,
        mesh: Mesh,
        sampling: SamplingConfig,
        *,
        rows: int,
        group_size: int = 1,
        steps: int = MOST_STEPS,
        pad: int = 0,
        record: Collection[str] = (),
    ):
        self._mesh, self._sampling, self._pad = mesh, sampling, pad
        self._passes = max(min(steps, MOST_STEPS) // (sampling.drafts + 1), 1)
        self._devices = batch_shards(mesh)
        self._per_device = -(-rows // self._devices)
        self.rows = self._per_device * self._devices
        self.capacity = sampling.max_prompt_tokens + sampling.max_new_tokens
        self._prompts_at_once = -(-self._per_device // group_size)
        self._placed_at_once = max(self._per_device // 8, 1)
        self._vocab_size = model.vocab_size
        self._recurrent = "delta" in model.layer_types or model.canon_kernel_size > 0
        self.counts = Counts()
        self._work = Work.none(self.rows)
        self._version, self.outside = 0, False
        self._recorder = Recorder(model, self.capacity, frozenset(record))
        self._variables = self._weights = None
        self._programs = Programs(
            model, mesh, sampling, self.rows, self.capacity, self._recorder.record
        )

    def load(self, variables: dict, version: int = 0, *, read_again: bool = False) -> None:
        """Samples with these variables, {"params", "router"}, from the next token on.

        Args:
          version: their number, which is recorded with each token.
          read_again: reads what the rows in slots have so far with the new variables; without it
            they go on from what the older ones made of it.
        """
        if read_again:
            self._work = self._read_again()
        with jax.set_mesh(self._mesh):
            self._variables, self._version = variables, version
            self._weights = self._programs.prepare(variables)

    @contextlib.contextmanager
    def loaded(
        self, variables: dict, version: int = 0, *, recording: bool = True
    ) -> Iterator[None]:
        """Loads variables for the time being; what the engine has to do waits until then.

        At the end it lets go of them, and of all that was begun meanwhile. Where slots were in use
        before, there are two sets of them until then.

        Args:
          recording: without it trajectories have no records until then; what the programs record
            stays on the devices, so that they need not be compiled anew.
        """
        before, self._work = self._work, Work.none(self.rows)
        self.load(variables, version)
        self._recorder.on = recording
        try:
            yield
        finally:
            self.unload()
            self._recorder.on = True
            self._work = before

    def unload(self) -> None:
        """Lets go of the variables until others are loaded; what there is to do stays."""
        self._variables = self._weights = None

    def take_out(self) -> list[Trajectory]:
        """Returns what the completions that have not ended have so far, and lets go of them.

        They can go on where they are submitted again, by any engine. They have no routes and no
        selected keys: the layers choose anew for what is read again.
        """
        rows, self._work = self._read_again().rows, Work.none(self.rows)
        for row in rows:
            row.choices = []
        return [row.trajectory(UNFINISHED) for row in rows]

    def _read_again(self) -> Work:
        """Returns what there is to do, from where nothing is read.

        Raises UserError where a draft may have been rejected: the next token is to be drawn from
        what that left of the distribution, which only the slots know.
        """
        if self._work.slots and self._work.slots.rejected_BV is not None and self.busy:
            raise UserError(
                "sampling.draft_acceptance = 'rejection': a begun completion cannot be read again, "
                "as its last draft may have been rejected; 'coupled' can"
            )
        return self._work.to_read_again()

    def submit(self, prompt: Prompt, begun: Mapping[int, Trajectory] | None = None) -> None:
        """Adds a prompt to those that wait.

        Args:
          begun: what some of its completions have already, by their number: those that have not
            ended (`take_out`) go on, the others are done. A prompt with `reply` has `resumes` too.

        Raises UserError for a prompt that no slot can hold, or that asks for what cannot be.
        """
        check_prompt(prompt, self._sampling)
        begun = begun or {}
        rows = [
            Row.resume(prompt, begun[g]) if g in begun else Row.begin(prompt, g)
            for g in range(len(prompt.keys_G2))
            if g not in begun or begun[g].ended == UNFINISHED
        ]
        self._work.waiting.extend(read_together(rows))

    def run(
        self, prompts: Iterable[Prompt] = (), most_tokens: int | None = None
    ) -> Iterator[Trajectory]:
        """Yields the completions of prompts, and of those that wait already, each as it ends.

        Args:
          most_tokens: stops when so many have been sampled, or a few more; what has not ended goes
            on in the next `run`.
        """
        for prompt in prompts:
            self.submit(prompt)
        end = None if most_tokens is None else self.counts.sampled + most_tokens
        while self.busy and (end is None or self.counts.sampled < end):
            yield from self.step()

    def stream(self, prompt: Prompt) -> Iterator[int]:
        """Yields the ids of a prompt's only completion as they are sampled; no other may wait."""
        self.submit(prompt)
        sent = len(prompt.tokens)
        while self.busy:
            ended = self.step()
            row = next(filter(None, self._work.occupants), None)
            tokens = ended[0].tokens_T if ended else row.tokens if row else []
            yield from map(int, tokens[sent:])
            sent = max(sent, len(tokens))

    @property
    def busy(self) -> bool:
        """Whether any completion waits or is in a slot."""
        return self._work.waits or any(self._work.occupants)

    def step(self) -> list[Trajectory]:
        """Fills the slots, samples some tokens in each, and returns the rows that ended."""
        with jax.set_mesh(self._mesh):
            self._work.slots = self._work.slots or self._programs.empty()
            self._fill()
            self._read_turns()
            idle = self.rows + 1
            if self._work.waits:
                idle = self._work.occupants.count(None) + max(self.rows // 16, 1)
            allowed_BV = allowed_of(self._work.occupants, self._vocab_size)
            single_B = np.asarray(
                [bool(row) and self._goes_singly(row) for row in self._work.occupants]
            )
            passes = 1 if single_B.any() else self._passes
            self._work.slots, sampled = self._programs.advance(
                self._weights, self._work.slots, passes, idle, ~single_B, allowed_BV
            )
            ended = self._collect(jax.device_get(self._recorder.wanted(sampled)))
            live_B = np.asarray([row is not None for row in self._work.occupants])
            if not live_B[self._work.stale].all():
                self._work.slots = self._programs.halt(self._work.slots, live_B)
        return ended

    def _goes_singly(self, row: Row) -> bool:
        """Whether a row is looked at after every token.

        Either because a grammar is asked then, or because it may have to go on from before its last
        tokens, and its state cannot.
        """
        may_rewind = row.halts is not None and row.prompt.reply is not None
        return row.prompt.allowed is not None or (self._recurrent and may_rewind)

    def _collect(self, sampled: Sampled) -> list[Trajectory]:
        """Adds what was sampled to the rows, and returns those that ended."""
        ended, self._work.stale = [], []
        there_NBW = sampled.tokens != NOTHING
        passes = int(np.sum(there_NBW[:, :, 0]))
        self.counts.passes += passes
        self.counts.drafted += passes * self._sampling.drafts
        self.counts.accepted += int(np.sum(there_NBW)) - passes
        for slot in map(int, np.flatnonzero(np.any(there_NBW, axis=(0, 2)))):
            row, (pass_M, place_M) = self._work.occupants[slot], np.nonzero(there_NBW[:, slot])
            assert row is not None
            at = pass_M, slot, place_M
            support = self._recorder.support(sampled, at)
            row.add(Part.sampled(sampled, at, self._version, support))
            halted = row.halted()
            # What ends a row on the device is not read any more.
            read = len(row.tokens) - (halted is not None)
            now_read = slice(len(pass_M) - (halted is not None))
            now_read = pass_M[now_read], slot, place_M[now_read]
            before = len(row.tokens) - len(pass_M)
            row.choices += self._recorder.code(sampled.choices, now_read, before)
            self.counts.sampled += len(pass_M)
            if row.halts and (keep := row.halts(row.sampled)) is not None:
                self.counts.sampled -= row.in_turn - keep
                row.take_back(row.in_turn - keep)
                if halted is None:
                    self._work.stale.append(slot)
                halted = STOP
            if halted is None:
                continue
            if not self._goes_on(row, halted, slot, read):
                ended.append(row.trajectory(halted))
                self._work.occupants[slot] = None
        return ended

    def _goes_on(self, row: Row, halted: str, slot: int, read: int) -> bool:
        """Gives a row that halted its next turn, and tells whether it has one.

        Args:
          read: how many of its tokens its slot has read, those taken back included.
        """
        turn = row.prompt.reply(row.trajectory(halted)) if row.prompt.reply else None
        if turn is None:
            return False
        check_turn(turn, row)
        kept = len(row.tokens) - turn.take_back
        room = self.capacity - kept - len(turn.tokens)
        if room < 1:
            return False
        row.turn(dataclasses.replace(turn, max_new_tokens=min(turn.max_new_tokens, room)))
        if kept < read and self._recurrent:
            self._work.occupants[slot] = None
            self._work.waiting.appendleft([row])
        else:
            self._work.unread.append(Unread(slot, row, self._start_of_turn(row, kept, read)))
        return True

    def _start_of_turn(self, row: Row, kept: int, read: int) -> int:
        """Returns from which token on a row is read that keeps `kept` of the `read` ones before."""
        if kept >= read:
            return read
        # The last token is read anew for its logits, and what the MTP modules draft from.
        before = self._sampling.drafts + 1 if self._sampling.drafts else 0
        return max(min(kept - before, len(row.tokens) - 1), 0)

    def _fill(self) -> None:
        """Puts rows into idle slots until none is idle or none waits."""
        while True:
            idle = [
                [slot for slot in range(self._per_device) if not self._work.occupants[first + slot]]
                for first in range(0, self.rows, self._per_device)
            ]
            reading = next((each for each in self._work.readings if each.serves(idle)), None)
            if reading is None and self._work.waiting and any(idle):
                reading = self._read_some([device for device, slots in enumerate(idle) if slots])
            if reading is None:
                return
            self._place_some(reading, idle)
            self._work.readings = [each for each in self._work.readings if any(each.waiting)]

    def _read_some(self, devices: Sequence[int]) -> Reading:
        """Reads the tokens of the first rows that wait, and of others of their width."""
        width = self._width(self._work.waiting[0])
        at_once = max(min(self._prompts_at_once, READ_TOKENS // width), 1)
        chosen, others = [], collections.deque()
        for group in self._work.waiting:
            fits = len(chosen) < at_once * len(devices) and self._width(group) == width
            (chosen if fits else others).append(group)
        self._work.waiting = others
        tokens_RT = np.full((self._devices * at_once, width), self._pad, np.int32)
        count_R = np.zeros(len(tokens_RT), np.int32)
        waiting = [collections.deque() for _ in range(self._devices)]
        of_r: dict[int, list[Row]] = {}
        for place_of, group in enumerate(chosen):
            device, number = devices[place_of % len(devices)], place_of // len(devices)
            r, tokens = device * at_once + number, group[0].tokens
            count_R[r], tokens_RT[r, : len(tokens)], of_r[r] = len(tokens), tokens, group
            waiting[device].extend((number, row) for row in group)
            self.counts.read += len(tokens)
            self.counts.kept += len(tokens) * (len(group) - 1)
        *prompts, choices = self._programs.read(self._variables, tokens_RT, count_R)
        choices = jax.tree.map(to_host, choices) if self._recorder.on else None
        for r, group in of_r.items():
            coded = self._recorder.code(choices, (r, slice(count_R[r])), 0)
            for row in group:
                row.choices = list(coded)
        self._work.readings.append(Reading(tuple(prompts), waiting))
        return self._work.readings[-1]

    def _width(self, group: list[Row]) -> int:
        length, longest = len(group[0].tokens), self._sampling.max_prompt_tokens
        if length > longest:
            longest = self.capacity
        return min(next(width for width in WIDTHS if width >= length), longest)

    def _place_some(self, reading: Reading, idle: list[list[int]]) -> None:
        """Begins as many rows as there are idle slots, or as are placed at once, on each device."""
        M, nowhere = self._placed_at_once, self._per_device
        prompt_M = np.zeros(self._devices * M, np.int32)
        slot_M = np.full_like(prompt_M, nowhere)
        rows: list[Row | None] = [None] * len(prompt_M)
        for device, (waiting, slots) in enumerate(zip(reading.waiting, idle, strict=True)):
            for m, slot in enumerate(slots[: min(M, len(waiting))], start=device * M):
                prompt_M[m], rows[m] = waiting.popleft()
                slot_M[m] = slot
                self._work.occupants[device * self._per_device + slot] = rows[m]
        begun = prompt_M, slot_M, rules_of(rows)
        self._work.slots = self._programs.place(self._work.slots, *reading.prompts, *begun)

    def _read_turns(self) -> None:
        """Reads what rows have been given to read, a chunk of several rows at a time."""
        while self._work.unread:
            chunk, self._work.unread = next_chunk(
                self._work.unread,
                self._work.unread[0].width,
                self._devices,
                self._per_device,
                self._placed_at_once,
                self._pad,
            )
            self._work.slots, choices = self._programs.extend(
                self._weights, self._work.slots, *chunk[:4], rules_of(chunk.ready_M)
            )
            choices = jax.device_get(choices) if self._recorder.on else None
            for m, row in enumerate(chunk.readers_M):
                start, count = int(chunk.length_M[m]), int(chunk.count_M[m])
                self.counts.read += count
                if row in chunk.ready_M:
                    self.counts.kept += start
                if row:
                    row.keep_choices(start)
                    row.choices += self._recorder.code(choices, (m, slice(count)), start)
