"""Conversations to ids. A template is how turns are told apart; which tokens count as targets
follows from it.

    think        <|user|>question<|assistant|><think>thought</think><answer>answer</answer><|eos|>
    r1           the prompt of DeepSeek-R1-Zero (arXiv 2501.12948, table 1), then " <think>...",
    then <|eos|> checkpoint   what the chat template beside the tokenizer writes
    (data/chat_template.py)

Of "think" and "r1" markers are special ids if the tokenizer has them, and plain text if not; text
of users and systems is never read for markers. Of what a checkpoint's template writes every special
token is one, as in Hugging Face's apply_chat_template: a user's "<|im_end|>" too.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from data.chat_template import ChatTemplate, AssistantSpan
from data.documents import Messages, Tools
from data.tokenizer import COMPLETION_TAGS, Tokenizer
from errors import UserError

R1_PREAMBLE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first thinks about the reasoning process "
    "in the mind and then provides the user with the answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)

_TAG = re.compile("(" + "|".join(re.escape(tag) for tag in COMPLETION_TAGS) + ")")


class Template(Protocol):
    """A way to write conversations."""

    def prompt(self, messages: Messages, tokenizer: Tokenizer, tools: Tools | None) -> list[int]:
        """See `encode_prompt`."""
        ...

    def chat(
        self, messages: Messages, tokenizer: Tokenizer, tools: Tools | None
    ) -> tuple[list[int], list[float]]:
        """See `encode_chat`."""
        ...


def encode_tags(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text whose <think>, </think>, <answer>, </answer> become special ids where the
    tokenizer has them.
    """
    return [
        index
        for part in _TAG.split(text)
        if part
        for index in (_marker(part, tokenizer) if part in COMPLETION_TAGS else tokenizer.encode(part))
    ]


def _marker(text: str, tokenizer: Tokenizer) -> list[int]:
    special = tokenizer.special_token_id(text)
    return tokenizer.encode(text) if special is None else [special]


@dataclass(frozen=True)
class TurnTemplate:
    """[system] user assistant user ..., message by message. Each function returns ids; `assistant`
    only what the assistant itself writes, `cue` what makes it speak. Tools are not written.
    """

    opening: Callable[[Tokenizer], list[int]]
    system: Callable[[str, Tokenizer], list[int]]
    user: Callable[[str, Tokenizer], list[int]]
    cue: Callable[[Tokenizer], list[int]]
    assistant: Callable[[str, Tokenizer], list[int]]

    def prompt(self, messages: Messages, tokenizer: Tokenizer, tools: Tools | None) -> list[int]:
        _check_turns(messages, last="user")
        return self._encode(messages, tokenizer)[0]

    def chat(
        self, messages: Messages, tokenizer: Tokenizer, tools: Tools | None
    ) -> tuple[list[int], list[float]]:
        _check_turns(messages, last="assistant")
        return self._encode(messages, tokenizer)

    def _encode(self, messages: Messages, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
        ids = self.opening(tokenizer)
        weights = [0.0] * len(ids)
        for message in messages:
            if message["role"] == "assistant":
                added, weight = self.assistant(message["content"], tokenizer) + [tokenizer.eos], 1.0
            elif message["role"] == "user":
                added, weight = self.user(message["content"], tokenizer) + self.cue(tokenizer), 0.0
            else:
                added, weight = self.system(message["content"], tokenizer), 0.0
            ids += added
            weights += [weight] * len(added)
        return ids, weights


class CheckpointTemplate:
    """The tokenizer's own chat template, which alone decides what roles, fields and order of
    messages there may be.
    """

    def prompt(self, messages: Messages, tokenizer: Tokenizer, tools: Tools | None) -> list[int]:
        return tokenizer.encode_rendered(
            self._template(tokenizer).render(messages, add_generation_prompt=True, tools=tools)
        )

    def chat(
        self, messages: Messages, tokenizer: Tokenizer, tools: Tools | None
    ) -> tuple[list[int], list[float]]:
        text, turns = self._template(tokenizer).render_with_spans(messages, tools)
        ids, spans = tokenizer.encode_rendered_with_offsets(text)
        weights = [0.0] * len(ids)
        for turn in turns:
            for index in _targets(turn, text, ids, spans, tokenizer):
                weights[index] = 1.0
        return ids, weights

    @staticmethod
    def _template(tokenizer: Tokenizer) -> ChatTemplate:
        if tokenizer.chat_template is None:
            missing = 'no chat_template.jinja beside it, nor a "chat_template" in its tokenizer_config.json'
            raise UserError(
                f'data.chat_template = "checkpoint": the tokenizer {tokenizer.name} has no chat template ({missing})'
            )
        return tokenizer.chat_template


TEMPLATES: dict[str, Template] = {
    "think": TurnTemplate(
        opening=lambda tokenizer: [],
        system=lambda text, tokenizer: tokenizer.encode(text),
        user=lambda text, tokenizer: _marker("<|user|>", tokenizer) + tokenizer.encode(text),
        cue=lambda tokenizer: _marker("<|assistant|>", tokenizer),
        assistant=encode_tags,
    ),
    "r1": TurnTemplate(
        opening=lambda tokenizer: encode_tags(R1_PREAMBLE, tokenizer),
        system=lambda text, tokenizer: tokenizer.encode(f" {text}"),
        user=lambda text, tokenizer: tokenizer.encode(f" User: {text}."),
        cue=lambda tokenizer: tokenizer.encode(" Assistant:"),
        assistant=lambda text, tokenizer: encode_tags(f" {text}", tokenizer),
    ),
    "checkpoint": CheckpointTemplate(),
}


def encode_prompt(
    messages: Messages, tokenizer: Tokenizer, template: str, tools: Tools | None = None
) -> list[int]:
    """Ids of a conversation whose next turn is the assistant's; they end where it begins to write.

    Raises UserError if the template cannot write it: for "think" and "r1" the roles must take
    turns, and the last be the user's.
    """
    return _named(template).prompt(messages, tokenizer, tools)


def encode_chat(
    messages: Messages, tokenizer: Tokenizer, template: str, tools: Tools | None = None
) -> tuple[list[int], list[float]]:
    """Ids of a whole conversation, and the weight of each as a target: 1 for what the assistant
    writes, the id that ends its turn included, else 0.

    With "checkpoint" a turn that the template does not leave as it was sampled is context, of
    weight 0: see `ChatTemplate.written`.

    Raises UserError if the template cannot write it: for "think" and "r1" the roles must take
    turns, and the last be the assistant's.
    """
    return _named(template).chat(messages, tokenizer, tools)


def _named(template: str) -> Template:
    if template not in TEMPLATES:
        raise UserError(f'data.chat_template = "{template}": must be one of {", ".join(TEMPLATES)}')
    return TEMPLATES[template]


def _targets(
    turn: AssistantSpan, text: str, ids: list[int], spans: list[tuple[int, int]], tokenizer: Tokenizer
) -> range:
    """The ids that the assistant wrote of a turn, where sampling would have ended it.

    That is at the first stop. What is behind it, such as an end of line, is the template's. A turn
    without one ends at the stop right behind it, where the next speaker's marker is a stop; else at
    a special token with only space behind it; else where the rendering of the turn does. An id
    whose characters are only in part the turn's is not one that the assistant could have written,
    and does not count.

    Raises UserError if more than special tokens and space is behind the stop: the message itself
    holds one.
    """
    inside = [
        index
        for index, (start, end) in enumerate(spans)
        if turn.start <= start < turn.end and end <= turn.end
    ]
    if not inside:
        return range(0)
    first, last = inside[0], inside[-1]

    def blank(index: int) -> bool:
        return tokenizer.is_special(ids[index]) or not text[slice(*spans[index])].strip()

    stop = next((index for index in inside if ids[index] in tokenizer.stops), None)
    if stop is not None:
        if not all(blank(index) for index in range(stop + 1, last + 1)):
            raise UserError(
                f"message {turn.number} holds {text[slice(*spans[stop])]}, at which sampling stops, before its end"
            )
        return range(first, stop + 1)
    if last + 1 < len(ids) and ids[last + 1] in tokenizer.stops:
        return range(first, last + 2)
    special = next((index for index in reversed(inside) if tokenizer.is_special(ids[index])), None)
    return range(
        first,
        special + 1
        if special is not None and all(blank(index) for index in range(special, last + 1))
        else last + 1,
    )


def _check_turns(messages: Messages, last: str) -> None:
    """Raises UserError unless the turns are [system] user assistant user ... , each with a text,
    the last as asked for.
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if message["role"] != expected:
            place = number + 1 + len(messages) - len(turns)
            raise UserError(
                f'message {place} of {len(messages)} has role "{message["role"]}" where "{expected}" is due (user and assistant take turns)'
            )
    if not turns or turns[-1]["role"] != last:
        raise UserError(
            f'the conversation must end with a message of role "{last}"'
            + (f', not "{turns[-1]["role"]}"' if turns else "; it is empty")
        )
    for number, message in enumerate(messages, 1):
        if not isinstance(message.get("content"), str):
            raise UserError(
                f'message {number} of {len(messages)} has no text as "content", which only data.chat_template = "checkpoint" can write'
            )


@dataclass(frozen=True)
class Parsed:
    """A completion taken apart. `thought` and `answer` are "" unless it is well formed."""

    thought: str
    answer: str
    well_formed: bool


def parse_completion(text: str) -> Parsed:
    """Strict: one <think> block, then one <answer> block, and nothing else but space around them;
    tags inside a block do not pass.
    """
    found = re.fullmatch(
        r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", text, flags=re.DOTALL
    )
    if found is None or any(_TAG.search(block) for block in found.groups()):
        return Parsed("", "", False)
    return Parsed(found[1].strip(), found[2].strip(), True)
