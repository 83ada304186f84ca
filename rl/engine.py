"""Sampling with continuous batching: a slot whose row ends takes the next prompt at once.

    engine = Engine(model, mesh, sampling, rows=64)
    engine.load(variables)
    for trajectory in engine.run(prompts):
        ...

This is the host's part: which prompt goes into which slot, and what came out of it. The programs
that it calls are in rl/slots.py. A prompt is read once, whatever the number of its completions.
What a completion samples depends on the weights, its prompt and its key alone, not on its slot, on
the others, or on when it began.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from errors import UserError
from kernels.device import compiler_options
from model.cache import Cache
from model.config import ModelConfig
from model.decode import decode_weights
from model.sharding import batch_sharding, batch_shards, replicated
from rl.config import SamplingConfig
from rl.slots import NOTHING, STOPS, advance, empty_slots, place, read_prompts
from rl.trajectory import LENGTH, STOP, Role, Trajectory

WIDTHS = tuple(2 * 4**n for n in range(2, 12))  # 32, 128, 512, ...: tokens that prompts are read in
MOST_STEPS = 32
READ_TOKENS = 1_024  # at most so many at a time, or one prompt


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, and what is to be sampled after it.

    Attributes:
      tokens: its ids, at least one.
      keys_G2: uint32, the data of a random key for each of G completions (`keys_of`).
      max_new_tokens: how many tokens a completion may have.
      stops: ids with which a completion ends.
      group: its number, which its trajectories carry.
    """

    tokens: Sequence[int]
    keys_G2: np.ndarray
    max_new_tokens: int
    stops: tuple[int, ...] = ()
    group: int = 0


class _Begin(NamedTuple):
    """A completion that waits for a slot: its prompt's number among those read with it."""

    number: int
    prompt: Prompt
    sample: int


@dataclasses.dataclass
class _Reading:
    """Prompts that have been read, and the completions of each device that wait for a slot."""

    cache: Cache
    logits_RV: Array
    waiting: list[collections.deque[_Begin]]

    def serves(self, idle: list[list[int]]) -> bool:
        """Tells whether any device has both an idle slot and a completion that waits."""
        return any(map(min, zip(map(len, self.waiting), map(len, idle), strict=True)))


@dataclasses.dataclass
class _Row:
    """A completion in a slot: what it has sampled, in parts."""

    prompt: Prompt
    sample: int
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    log_kept: list[np.ndarray] = dataclasses.field(default_factory=list)
    versions: list[np.ndarray] = dataclasses.field(default_factory=list)
    length: int = 0

    @property
    def sampled(self) -> np.ndarray:
        """The ids so far."""
        return np.concatenate(self.tokens)

    def ended(self) -> str | None:
        """Returns why it ended, or None if it goes on."""
        if self.tokens and self.tokens[-1][-1] in self.prompt.stops:
            return STOP
        return LENGTH if self.length == self.prompt.max_new_tokens else None

    def trajectory(self, ended: str) -> Trajectory:
        """Returns what happened."""
        prompt = np.asarray(self.prompt.tokens, np.int32)
        zeros, none = np.zeros(len(prompt), np.float32), np.full(len(prompt), -1, np.int32)
        roles = [np.full(len(prompt), Role.PROMPT, np.int8)]
        return Trajectory(
            np.concatenate([prompt, *self.tokens]),
            np.concatenate([*roles, np.full(self.length, Role.MODEL, np.int8)]),
            np.concatenate([zeros, *self.logprobs]),
            np.concatenate([zeros, *self.log_kept]),
            np.concatenate([none, *self.versions]),
            ended,
            self.prompt.group,
            self.sample,
        )


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
    ):
        self._mesh, self._sampling, self._pad = mesh, sampling, pad
        self._steps = min(steps, MOST_STEPS)
        self._devices = batch_shards(mesh)
        self._per_device = -(-rows // self._devices)
        self.rows = self._per_device * self._devices
        self.capacity = sampling.max_prompt_tokens + sampling.max_new_tokens
        self._prompts_at_once = -(-self._per_device // group_size)
        self._placed_at_once = max(self._per_device // 8, 1)
        self._occupants: list[_Row | None] = [None] * self.rows
        self._waiting: collections.deque[Prompt] = collections.deque()
        self._readings: list[_Reading] = []
        self._version = 0
        self._variables = self._weights = self._slots = None
        # What only moves arrays need not be optimised well; decoding does: it takes 7 % longer with
        # the options that spare a CPU's compiler work.
        quick = compiler_options(mesh)
        self._prepare = jax.jit(
            functools.partial(decode_weights, model, rows=self.rows), compiler_options=quick
        )
        # Every program gives its slots back in one and the same sharding: another would be another
        # program to compile.
        by_row = functools.partial(jax.jit, out_shardings=batch_sharding(mesh))
        empty = functools.partial(empty_slots, model, sampling, self.rows, self.capacity)
        self._empty = by_row(empty, compiler_options=quick)
        self._read = by_row(functools.partial(read_prompts, model, sampling, self.capacity))
        self._place = by_row(functools.partial(place), donate_argnums=0, compiler_options=quick)
        self._advance = jax.jit(
            functools.partial(advance, model, sampling, MOST_STEPS),
            donate_argnums=1,
            out_shardings=(batch_sharding(mesh), replicated(mesh)),
        )

    @property
    def compilations(self) -> int:
        """How many programs have been compiled."""
        programs = self._prepare, self._empty, self._read, self._place, self._advance
        return sum(
            program._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
            for program in programs
        )

    def load(self, variables: dict, version: int = 0) -> None:
        """Samples with these variables, {"params", "router"}, from the next token on.

        Args:
          version: their number, which is recorded with each token.
        """
        with jax.set_mesh(self._mesh):
            self._variables, self._version = variables, version
            self._weights = self._prepare(variables)
            if self._slots is None:
                self._slots = self._empty()

    @contextlib.contextmanager
    def loaded(self, variables: dict, version: int = 0) -> Iterator[None]:
        """Loads variables, and lets go of them and of all that waits or is in a slot at the end."""
        self.load(variables, version)
        try:
            yield
        finally:
            self._variables = self._weights = self._slots = None
            self._occupants = [None] * self.rows
            self._waiting.clear()
            self._readings.clear()

    def submit(self, prompt: Prompt) -> None:
        """Adds a prompt to those that wait.

        Raises UserError for a prompt that no slot can hold, or without a token.
        """
        longest, new = self._sampling.max_prompt_tokens, prompt.max_new_tokens
        length = len(prompt.tokens)
        if not length:
            raise UserError("a prompt is empty: there is nothing to go on from")
        if length > longest:
            raise UserError(
                f"sampling.max_prompt_tokens = {longest}: a prompt has {length} tokens; "
                "raise it to at least that"
            )
        if not 0 < new <= self._sampling.max_new_tokens:
            raise UserError(
                f"a prompt asks for {new} new tokens: must be between 1 and "
                f"sampling.max_new_tokens = {self._sampling.max_new_tokens}"
            )
        if len(prompt.stops) > STOPS:
            raise UserError(f"a prompt has {len(prompt.stops)} stop ids; at most {STOPS} may be")
        self._waiting.append(prompt)

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Trajectory]:
        """Yields the completions of prompts, each as it ends."""
        for prompt in prompts:
            self.submit(prompt)
        while self.busy:
            yield from self.step()

    def stream(self, prompt: Prompt) -> Iterator[int]:
        """Yields the ids of a prompt's only completion as they are sampled; no other may wait."""
        self.submit(prompt)
        sent = 0
        while self.busy:
            ended = self.step()
            sampled = ended[0].completion if ended else next(filter(None, self._occupants)).sampled
            yield from map(int, sampled[sent:])
            sent = len(sampled)

    @property
    def busy(self) -> bool:
        """Whether any completion waits or is in a slot."""
        return bool(self._waiting) or self._reads_wait or any(self._occupants)

    def step(self) -> list[Trajectory]:
        """Fills the slots, samples some tokens in each, and returns the rows that ended."""
        with jax.set_mesh(self._mesh):
            self._fill()
            idle = self.rows + 1
            if self._waiting or self._reads_wait:
                idle = self._occupants.count(None) + max(self.rows // 16, 1)
            self._slots, sampled = self._advance(self._weights, self._slots, self._steps, idle)
            sampled = jax.device_get(sampled)
        ended = []
        count_B = np.sum(sampled.tokens != NOTHING, axis=0)
        for slot in np.flatnonzero(count_B):
            count, row = count_B[slot], self._occupants[slot]
            assert row is not None
            row.tokens.append(sampled.tokens[:count, slot])
            row.logprobs.append(sampled.logprobs[:count, slot])
            row.log_kept.append(sampled.log_kept[:count, slot])
            row.versions.append(np.full(count, self._version, np.int32))
            row.length += count
            if (reason := row.ended()) is not None:
                ended.append(row.trajectory(reason))
                self._occupants[slot] = None
        return ended

    @property
    def _reads_wait(self) -> bool:
        return any(any(reading.waiting) for reading in self._readings)

    def _fill(self) -> None:
        """Puts completions into idle slots until none is idle or none waits."""
        while True:
            idle = [
                [slot for slot in range(self._per_device) if not self._occupants[first + slot]]
                for first in range(0, self.rows, self._per_device)
            ]
            reading = next((each for each in self._readings if each.serves(idle)), None)
            if reading is None and self._waiting and any(idle):
                reading = self._read_some([device for device, slots in enumerate(idle) if slots])
            if reading is None:
                return
            self._place_some(reading, idle)
            self._readings = [each for each in self._readings if any(each.waiting)]

    def _read_some(self, devices: Sequence[int]) -> _Reading:
        """Reads the first prompt that waits, and others of its width, on these devices."""
        width = self._width(self._waiting[0])
        at_once = max(min(self._prompts_at_once, READ_TOKENS // width), 1)
        chosen = [each for each in self._waiting if self._width(each) == width]
        chosen = chosen[: at_once * len(devices)]
        taken = set(map(id, chosen))
        self._waiting = collections.deque(each for each in self._waiting if id(each) not in taken)
        tokens_RT = np.full((self._devices * at_once, width), self._pad, np.int32)
        count_R = np.zeros(len(tokens_RT), np.int32)
        waiting = [collections.deque[_Begin]() for _ in range(self._devices)]
        for place_of, prompt in enumerate(chosen):
            device, number = devices[place_of % len(devices)], place_of // len(devices)
            row = device * at_once + number
            count_R[row] = len(prompt.tokens)
            tokens_RT[row, : count_R[row]] = prompt.tokens
            waiting[device].extend(
                _Begin(number, prompt, sample) for sample in range(len(prompt.keys_G2))
            )
        cache, logits_RV = self._read(self._variables, tokens_RT, count_R)
        self._readings.append(_Reading(cache, logits_RV, waiting))
        return self._readings[-1]

    def _width(self, prompt: Prompt) -> int:
        longest, length = self._sampling.max_prompt_tokens, len(prompt.tokens)
        return min(next(width for width in WIDTHS if width >= length), longest)

    def _place_some(self, reading: _Reading, idle: list[list[int]]) -> None:
        """Begins as many rows as there are idle slots, or as are placed at once, on each device."""
        M, nowhere = self._placed_at_once, self._per_device
        prompt_M = np.zeros(self._devices * M, np.int32)
        slot_M, left_M = np.full_like(prompt_M, nowhere), np.zeros_like(prompt_M)
        key_M2 = np.zeros((len(prompt_M), 2), np.uint32)
        stop_MK = np.full((len(prompt_M), STOPS), -1, np.int32)
        for device, (waiting, slots) in enumerate(zip(reading.waiting, idle, strict=True)):
            for m, slot in enumerate(slots[: min(M, len(waiting))], start=device * M):
                number, prompt, sample = waiting.popleft()
                prompt_M[m], slot_M[m], left_M[m] = number, slot, prompt.max_new_tokens
                key_M2[m] = prompt.keys_G2[sample]
                stop_MK[m, : len(prompt.stops)] = prompt.stops
                self._occupants[device * self._per_device + slot] = _Row(prompt, sample)
        begun = reading.cache, reading.logits_RV, prompt_M, slot_M, key_M2, left_M, stop_MK
        self._slots = self._place(self._slots, *begun)


def slots_that_fit(
    model: ModelConfig, mesh: Mesh, sampling: SamplingConfig, completions: int
) -> int:
    """Returns how many slots there are to be: one a completion, or as many as are allowed.

    `sampling.slots` and `sampling.cache_gib` say how many that is on each device. Says on standard
    output what it comes to.

    Raises UserError if not even one slot fits.
    """
    capacity = sampling.max_prompt_tokens + sampling.max_new_tokens
    slot = jax.eval_shape(lambda: empty_slots(model, sampling, 1, capacity))
    slot_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(slot))
    per_device = int(sampling.cache_gib * 2**30 // slot_bytes)
    if not per_device:
        raise UserError(
            f"sampling.cache_gib = {sampling.cache_gib}: one slot of {capacity:,} tokens takes "
            f"{slot_bytes / 2**30:.2f} GiB; raise it, or lower sampling.max_new_tokens"
        )
    devices = batch_shards(mesh)
    slots = min(completions, sampling.slots * devices, per_device * devices)
    if jax.process_index() == 0:
        size = f"{slots:,} slots of {slot_bytes / 2**20:.2f} MiB"
        most = f"{per_device * devices:,} fit sampling.cache_gib"
        print(f"{'sampling':<12}{size}; {most}", flush=True)
    return slots


def keys_of(key: Array, numbers: Sequence[int], group_size: int) -> np.ndarray:
    """Returns the random keys of prompts' completions, uint32 [P, G, 2].

    The g-th completion of the prompt of number n has a key of n and g alone.
    """
    fold_G = jax.vmap(jax.random.fold_in, (None, 0))

    def keys_G(number: Array) -> Array:
        return fold_G(jax.random.fold_in(key, number), jnp.arange(group_size))

    return np.asarray(jax.random.key_data(jax.vmap(keys_G)(jnp.asarray(numbers))))
