"""What is asked of the engine, and what it keeps of a completion while it is being sampled."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from errors import UserError
from rl.coding import CodedSets
from rl.config import SamplingConfig
from rl.records import CodedChoices
from rl.slots import IDS, NOTHING, Rules, Sampled
from rl.trajectory import LENGTH, STOP, Role, Trajectory

Halts = Callable[[np.ndarray], int | None]
PER_TOKEN = ("tokens", "roles", "logprobs", "log_kept", "versions")  # fields of a part


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a completion reads when it has halted, and how it goes on after that.

    Attributes:
      tokens: ids that are read, maybe none: then it goes on from where it is.
      role: who wrote them.
      max_new_tokens: how many tokens may be sampled before it halts again.
      stops, forbidden, halts: as of a `Prompt`, from here on.
      take_back: how many of the sampled tokens are taken back before, the last ones.
    """

    tokens: Sequence[int]
    role: Role
    max_new_tokens: int
    stops: tuple[int, ...] = ()
    forbidden: tuple[int, ...] = ()
    halts: Halts | None = None
    take_back: int = 0


@dataclasses.dataclass(frozen=True)
class Resumed:
    """Where a completion is that goes on from what it has.

    Attributes:
      turn: how it goes on from there; nothing is read for it.
      in_turn: how many of its last tokens were sampled since the prompt or the last turn.
    """

    turn: Turn
    in_turn: int


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, and what is to be sampled after it.

    Attributes:
      tokens: its ids, at least one.
      keys_G2: uint32, the data of a random key for each of G completions (`keys_of`).
      max_new_tokens: how many tokens a completion may sample before it halts.
      stops: ids with which a completion halts.
      forbidden: ids that are never sampled.
      group: its number, which its trajectories carry.
      reply: asked what follows when a completion has halted; None, or a reply of None, ends it.
      halts: asked, with the ids sampled since the prompt or the last turn, how many of them are to
        be kept if it shall halt there, or None. It is asked every few tokens, and what was sampled
        beyond is dropped.
      allowed: asked, with the ids sampled since then, which ids may follow, bool [V]. While a row
        with it is live the engine samples one token at a time, so it is never late.
      resumes: asked where a completion with something already is, which goes on in an engine; None
        is in the turn of the prompt.
    """

    tokens: Sequence[int]
    keys_G2: np.ndarray
    max_new_tokens: int
    stops: tuple[int, ...] = ()
    forbidden: tuple[int, ...] = ()
    group: int = 0
    reply: Callable[[Trajectory], Turn | None] | None = None
    halts: Halts | None = None
    allowed: Callable[[np.ndarray], np.ndarray] | None = None
    resumes: Callable[[Trajectory], Resumed] | None = None


def check_prompt(prompt: Prompt, sampling: SamplingConfig) -> None:
    """Raises UserError for a prompt that no slot can hold, or that asks for what cannot be."""
    longest, most = sampling.max_prompt_tokens, sampling.max_new_tokens
    length = len(prompt.tokens)
    if not length:
        raise UserError("a prompt is empty: there is nothing to go on from")
    if length > longest:
        raise UserError(
            f"sampling.max_prompt_tokens = {longest}: a prompt has {length} tokens; "
            "raise it to at least that"
        )
    if not 0 < prompt.max_new_tokens <= most:
        raise UserError(
            f"a prompt asks for {prompt.max_new_tokens} new tokens: must be between 1 and "
            f"sampling.max_new_tokens = {most}"
        )
    _check_ids("a prompt", prompt)


def check_turn(turn: Turn, row: "Row") -> None:
    """Raises UserError for a turn that cannot be: a row would never end, or lose its prompt."""
    who = f"the reply to a completion of prompt {row.prompt.group}"
    if turn.max_new_tokens < 1:
        raise UserError(f"{who} asks for {turn.max_new_tokens} new tokens: must be at least 1")
    if not 0 <= turn.take_back <= row.in_turn:
        raise UserError(
            f"{who} takes {turn.take_back} tokens back: must be between 0 and {row.in_turn}, those "
            "sampled since the prompt or the last turn"
        )
    _check_ids(who, turn)


def _check_ids(who: str, asked: Prompt | Turn) -> None:
    for kind, ids in (("stop", asked.stops), ("forbidden", asked.forbidden)):
        if len(ids) > IDS:
            raise UserError(f"{who} has {len(ids)} {kind} ids; at most {IDS} may be")


@dataclasses.dataclass(eq=False)
class Row:
    """A completion on its way.

    Attributes:
      prompt, sample: what it completes, and its number among the completions of that.
      left: tokens that it may sample before it halts.
      stops, forbidden, halts: as in `Prompt`, at present.
      parts: what follows the prompt, in order: the records of tokens sampled and of turns read.
      in_turn: how many of the last tokens were sampled since the prompt or the last turn.
      choices: what the layers chose for the tokens read so far, in order, where it is recorded.
    """

    prompt: Prompt
    sample: int
    left: int
    stops: tuple[int, ...]
    forbidden: tuple[int, ...]
    halts: Halts | None
    parts: list["Part"]
    in_turn: int = 0
    choices: list[CodedChoices] = dataclasses.field(default_factory=list)

    @classmethod
    def begin(cls, prompt: Prompt, sample: int) -> "Row":
        """Returns a completion that has nothing yet but its prompt."""
        ids = np.asarray(prompt.tokens, np.int32)
        return cls(
            prompt,
            sample,
            prompt.max_new_tokens,
            prompt.stops,
            prompt.forbidden,
            prompt.halts,
            [Part.read(ids, Role.PROMPT)],
        )

    @classmethod
    def resume(cls, prompt: Prompt, begun: Trajectory) -> "Row":
        """Returns a completion that goes on from what it has."""
        row, start = cls.begin(prompt, begun.sample), len(prompt.tokens)
        if len(begun.tokens_T) > start:
            fields = {name: getattr(begun, f"{name}_T")[start:] for name in PER_TOKEN}
            support = begun.support_T and begun.support_T.between(start, len(begun.tokens_T))
            row.add(Part(**fields, support=support))
            if prompt.resumes:
                resumed = prompt.resumes(begun)
                row.turn(resumed.turn)
                row.in_turn = resumed.in_turn
        return row

    @property
    def only_prompt(self) -> bool:
        """Whether it has nothing yet but its prompt."""
        return len(self.parts) == 1

    @property
    def tokens(self) -> np.ndarray:
        """All ids, those of the prompt first."""
        return np.concatenate([part.tokens for part in self.parts])

    @property
    def sampled(self) -> np.ndarray:
        """The ids sampled since the prompt or the last turn."""
        tokens = self.tokens
        return tokens[len(tokens) - self.in_turn :]

    def add(self, part: "Part") -> None:
        """Adds tokens that were sampled."""
        self.parts.append(part)
        self.in_turn += len(part.tokens)
        self.left -= len(part.tokens)

    def halted(self) -> str | None:
        """Returns why it cannot go on by itself, or None if it can."""
        last = self.parts[-1]
        if self.in_turn and last.tokens[-1] in self.stops:
            return STOP
        return LENGTH if self.left <= 0 else None

    def take_back(self, count: int) -> None:
        """Drops the last of the tokens sampled since the prompt or the last turn."""
        self.in_turn -= count
        while count:
            last = self.parts.pop()
            if len(last.tokens) > count:
                self.parts.append(last.first(len(last.tokens) - count))
            count -= min(len(last.tokens), count)

    def turn(self, turn: Turn) -> None:
        """Adds what is read next."""
        self.take_back(turn.take_back)
        if len(turn.tokens):
            self.parts.append(Part.read(np.asarray(turn.tokens, np.int32), turn.role))
        self.in_turn, self.left = 0, turn.max_new_tokens
        self.stops, self.forbidden, self.halts = turn.stops, turn.forbidden, turn.halts

    def keep_choices(self, count: int) -> None:
        """Drops the choices of all but the first so many tokens."""
        if self.choices:
            whole = CodedChoices.joined(self.choices)
            self.choices = [whole.resized(min(count, len(whole)))]

    def trajectory(self, ended: str) -> Trajectory:
        """Returns what happened."""
        length = sum(len(part.tokens) for part in self.parts)
        choices = CodedChoices(None, None)
        if self.choices:  # the last token, which nothing follows, may not have been read
            choices = CodedChoices.joined(self.choices).resized(length)
        support = next((part.support for part in self.parts if part.support), None)
        if support:
            of_all = functools.partial(CodedSets.of_all, layers=1, bound=support.width)
            support = CodedSets.joined(
                [part.support or of_all(len(part.tokens)) for part in self.parts]
            )
        fields = {
            f"{name}_T": np.concatenate([getattr(part, name) for part in self.parts])
            for name in PER_TOKEN
        }
        return Trajectory(
            **fields,
            ended=ended,
            group=self.prompt.group,
            sample=self.sample,
            **vars(choices),
            support_T=support,
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """Some tokens of a trajectory: its fields of these, see `Trajectory`."""

    tokens: np.ndarray
    roles: np.ndarray
    logprobs: np.ndarray
    log_kept: np.ndarray
    versions: np.ndarray
    support: CodedSets | None = None

    @classmethod
    def read(cls, tokens: np.ndarray, role: Role) -> "Part":
        """Returns tokens that were not sampled."""
        count = len(tokens)
        zeros = np.zeros(count, np.float32)
        return cls(
            tokens, np.full(count, role, np.int8), zeros, zeros, np.full(count, -1, np.int32)
        )

    @classmethod
    def sampled(
        cls, sampled: Sampled, at: tuple, version: int, support: CodedSets | None
    ) -> "Part":
        """Returns those tokens of what was sampled, with weights of this version."""
        tokens = np.asarray(sampled.tokens[at])
        return cls(
            tokens,
            np.full(len(tokens), Role.MODEL, np.int8),
            np.asarray(sampled.logprobs[at]),
            np.asarray(sampled.log_kept[at]),
            np.full(len(tokens), version, np.int32),
            support,
        )

    def first(self, count: int) -> "Part":
        """Returns the first so many tokens."""
        arrays = {name: value[:count] for name, value in vars(self).items() if name != "support"}
        support = self.support.between(0, count) if self.support else None
        return Part(**arrays, support=support)


@dataclasses.dataclass
class Counts:
    """What an engine has done: numbers of tokens.

    sampled: that were sampled, those dropped again not included.
    read: that were read to go on from: prompts and turns.
    kept: that were not read again, since a completion of the same prompt, or the same row, had.
    passes: times that the model went over a row to sample: without drafts, once for every token.
    drafted, accepted: that MTP modules drafted in these passes, and those of them that were taken.
    """

    sampled: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    read: int = 0
    kept: int = 0

    def since(self, before: "Counts") -> "Counts":
        """Returns what has been done since it stood at `before`."""
        return Counts(**{name: now - getattr(before, name) for name, now in vars(self).items()})


def read_together(rows: Sequence[Row]) -> list[list[Row]]:
    """Returns rows in groups of which each is read once.

    They are those of the same prompt that have nothing else, and each other row by itself.
    """
    groups, of_prompt = [], {}
    for row in rows:
        group = of_prompt.setdefault(id(row.prompt), []) if row.only_prompt else []
        if not group:
            groups.append(group)
        group.append(row)
    return groups


def rules_of(rows: Sequence[Row | None]) -> Rules:
    """Returns how rows go on; None is a row that is not live."""
    key_M2, left_M = np.zeros((len(rows), 2), np.uint32), np.zeros(len(rows), np.int32)
    stop_MK, forbidden_MK = (np.full((len(rows), IDS), NOTHING, np.int32) for _ in range(2))
    for m, row in enumerate(rows):
        if row:
            key_M2[m], left_M[m] = row.prompt.keys_G2[row.sample], row.left
            stop_MK[m, : len(row.stops)] = row.stops
            forbidden = sorted(set(row.forbidden))
            forbidden_MK[m, : len(forbidden)] = forbidden
    return Rules(*map(jnp.asarray, (key_M2, left_M, stop_MK, forbidden_MK)))


def allowed_of(rows: Sequence[Row | None], vocab_size: int) -> np.ndarray | None:
    """Returns which ids each row may sample next, bool [B, V], or None if no row asks."""
    if not any(row and row.prompt.allowed for row in rows):
        return None
    allowed_BV = np.ones((len(rows), vocab_size), bool)
    for allowed_V, row in zip(allowed_BV, rows, strict=True):
        if row and row.prompt.allowed:
            allowed_V[:] = row.prompt.allowed(row.sampled)
            if not allowed_V.any():
                raise UserError(f"prompt {row.prompt.group}: its `allowed` lets no id follow")
    return allowed_BV


def keys_of(key: Array | int, numbers: Sequence[int], group_size: int) -> np.ndarray:
    """Returns the random keys of prompts' completions, uint32 [P, G, 2].

    The g-th completion of the prompt of number n has a key of n and g alone.

    Args:
      key: a random key, or a seed.
      numbers: of P prompts.
      group_size: G, completions of each.
    """
    key = jax.random.key(key) if isinstance(key, int) else key
    fold_G = jax.vmap(jax.random.fold_in, (None, 0))

    def keys_G(number: Array) -> Array:
        return fold_G(jax.random.fold_in(key, number), jnp.arange(group_size))

    return np.asarray(jax.random.key_data(jax.vmap(keys_G)(jnp.asarray(numbers))))
