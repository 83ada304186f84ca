"""Conversations to ids, by one of three templates.

    think        <|user|>question<|assistant|><think>thought</think><answer>answer</answer><|eos|>
    r1           the prompt of DeepSeek-R1-Zero (arXiv 2501.12948, table 1), then " <think>...",
                 then <|eos|>
    checkpoint   the output of the chat template beside the tokenizer (data/chat_template.py)

The marks of "think" are special ids, and a tokenizer that lacks one is refused. "r1" is plain text,
for base models: its tags are special ids where the tokenizer has them, and else characters. What
users and systems write is never parsed for marks. In the output of a checkpoint's template every
special token is one, as in Hugging Face's apply_chat_template: a user's "<|im_end|>" too.

Whatever a template leaves out of a conversation (data/chat_omissions.py) is an error, or handed to
`omitted`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from data import jinja_templates
from data.chat_omissions import (
    Omitted,
    calls_of,
    last_message_with_context,
    omission,
    omitted_words,
    refuse_to_ask,
    refuse_to_learn,
    squeezed,
    thought_of,
)
from data.chat_targets import target_tokens
from data.chat_template import AssistantSpan, ChatTemplate
from data.documents import Messages, Tools
from data.special_tokens import COMPLETION_TAGS
from data.tokenizer import Encoding, Tokenizer
from errors import UserError

R1_PREAMBLE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant "
    "solves it. The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer. The reasoning process and answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>."
)

_TAG = re.compile("(" + "|".join(re.escape(tag) for tag in COMPLETION_TAGS) + ")")


class Template(Protocol):
    """A way to write conversations as ids; `encode_prompt` and `encode_chat` say what they do."""

    def encode_prompt(
        self, messages: Messages, tokenizer: Tokenizer, tools: Tools | None
    ) -> list[int]:
        """Encodes a conversation up to where the assistant begins to write."""
        ...

    def encode_chat(
        self,
        messages: Messages,
        tokenizer: Tokenizer,
        tools: Tools | None,
        omitted: Omitted,
        context: int,
    ) -> tuple[list[int], list[float]]:
        """Encodes a whole conversation; returns its ids and their weights as targets."""
        ...


@dataclass(frozen=True)
class TurnTemplate:
    """A template that writes [system] user assistant user ..., message by message.

    A thought in a field of its own stands in tags before the content. Tools and calls of tools
    cannot be written. Every field is a function that returns ids.

    Attributes:
      opening: encodes the beginning of a conversation.
      system: encodes what the system says.
      user: encodes what a user says.
      generation_prompt: encodes what makes the assistant speak, after each user.
      assistant: encodes what the assistant itself writes, except for the [eos] after it.
      jinja: the same as a checkpoint's own template, for those who read an exported checkpoint.
    """

    opening: Callable[[Tokenizer], list[int]]
    system: Callable[[str, Tokenizer], list[int]]
    user: Callable[[str, Tokenizer], list[int]]
    generation_prompt: Callable[[Tokenizer], list[int]]
    assistant: Callable[[str, Tokenizer], list[int]]
    jinja: str

    def encode_prompt(
        self, messages: Messages, tokenizer: Tokenizer, tools: Tools | None
    ) -> list[int]:
        """Encodes a conversation that ends with a user. Raises UserError for any other."""
        _check_turns(messages, last_role="user")
        return self._encode(messages, tokenizer, tools, refuse_to_ask, len(messages))[0]

    def encode_chat(
        self,
        messages: Messages,
        tokenizer: Tokenizer,
        tools: Tools | None,
        omitted: Omitted,
        context: int,
    ) -> tuple[list[int], list[float]]:
        """Encodes a conversation that ends with the assistant. Raises UserError for any other."""
        _check_turns(messages, last_role="assistant")
        return self._encode(messages, tokenizer, tools, omitted, context)

    def _encode(
        self,
        messages: Messages,
        tokenizer: Tokenizer,
        tools: Tools | None,
        omitted: Omitted,
        context: int,
    ) -> tuple[list[int], list[float]]:
        """Returns the tokens of a conversation and their loss weights: 1 in answers, else 0."""
        if tools:
            omitted("the chat template leaves out tools")
        ids = self.opening(tokenizer)
        weights = [0.0] * len(ids)
        for number, message in enumerate(messages, 1):
            role, content, weight = message["role"], message["content"], 0.0
            if role == "assistant":
                weight = 0.0 if tools or number <= context else 1.0
                calls, thought = calls_of(message), thought_of(message)
                if calls is not None:
                    omitted(omitted_words(number, len(messages), f'"{calls}"'))
                    weight = 0.0
                if thought is not None:
                    content = f"<think>{thought[1]}</think>{content}"
                added = [*self.assistant(content, tokenizer), tokenizer.eos]
            elif role == "user":
                added = self.user(content, tokenizer) + self.generation_prompt(tokenizer)
            else:
                added = self.system(content, tokenizer)
            ids += added
            weights += [weight] * len(added)
        return ids, weights


class CheckpointTemplate:
    """A template that writes what the chat template beside the tokenizer renders.

    That alone decides what roles, fields and order of messages there may be.
    """

    def encode_prompt(
        self, messages: Messages, tokenizer: Tokenizer, tools: Tools | None
    ) -> list[int]:
        """Encodes the rendering with the generation prompt. Raises UserError if it is refused."""
        template = _checkpoint_template(tokenizer)
        text = template.render(messages, add_generation_prompt=True, tools=tools)
        last_message_with_context(messages, tools, text, refuse_to_ask)
        return tokenizer.encode_rendered(text)

    def encode_chat(
        self,
        messages: Messages,
        tokenizer: Tokenizer,
        tools: Tools | None,
        omitted: Omitted,
        context: int,
    ) -> tuple[list[int], list[float]]:
        """Encodes the rendering; `target_tokens` says which tokens of it have weight 1.

        Raises:
          UserError: as `ChatTemplate.render_with_spans` and `target_tokens` do.
        """
        text, turns = _checkpoint_template(tokenizer).render_with_spans(messages, tools)
        encoding = tokenizer.encode_rendered_with_offsets(text)
        weights = [0.0] * len(encoding.ids)
        last = last_message_with_context(messages, tools, text, omitted)
        for turn in turns:
            if turn.message <= context:
                continue
            targets = target_tokens(turn, encoding, tokenizer)
            message = messages[turn.message - 1]
            content = message.get("content")
            sampled = _sampled_text(turn, targets, encoding, tokenizer, content)
            left_out = omission(message, squeezed(sampled))
            if left_out is not None:
                omitted(omitted_words(turn.message, len(messages), left_out))
            elif turn.message <= last:
                for index in targets:
                    weights[index] = 1.0
        return encoding.ids, weights


def _sampled_text(
    turn: AssistantSpan, targets: range, encoding: Encoding, tokenizer: Tokenizer, content: Any
) -> str:
    """Returns the characters of a turn without the special token that ends it.

    It stays if the content has it too.
    """
    end = turn.end
    if targets and tokenizer.is_special(encoding.ids[targets[-1]]):
        start, end = encoding.offsets[targets[-1]]
        if not (isinstance(content, str) and content.rstrip().endswith(encoding.text[start:end])):
            end = start
    return encoding.text[turn.start : end]


def _encode_tags(
    text: str, tokenizer: Tokenizer, encode_tag: Callable[[str, Tokenizer], list[int]]
) -> list[int]:
    """Encodes a text, its tags <think>, </think>, <answer> and </answer> by `encode_tag`."""
    ids = []
    for part in _TAG.split(text):
        if part in COMPLETION_TAGS:
            ids += encode_tag(part, tokenizer)
        elif part:
            ids += tokenizer.encode(part)
    return ids


def _encode_tag(text: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the id of a tag of "r1", or its characters where the tokenizer has none."""
    special = tokenizer.special_token_id(text)
    return tokenizer.encode(text) if special is None else [special]


def _encode_mark(text: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the id of a mark of "think". Raises UserError if the tokenizer has none."""
    special = tokenizer.special_token_id(text)
    if special is None:
        raise UserError(
            f'data.chat_template = "think": the tokenizer {tokenizer.name} has no {text}, a mark of'
            ' this template; set data.chat_template = "checkpoint" with a chat_template.jinja'
            ' beside the tokenizer, or "r1", which is plain text'
        )
    return [special]


TEMPLATES: dict[str, Template] = {
    "think": TurnTemplate(
        opening=lambda tokenizer: [],
        system=lambda text, tokenizer: tokenizer.encode(text),
        user=lambda text, tokenizer: _encode_mark("<|user|>", tokenizer) + tokenizer.encode(text),
        generation_prompt=lambda tokenizer: _encode_mark("<|assistant|>", tokenizer),
        assistant=lambda text, tokenizer: _encode_tags(text, tokenizer, _encode_mark),
        jinja=jinja_templates.THINK,
    ),
    "r1": TurnTemplate(
        opening=lambda tokenizer: _encode_tags(R1_PREAMBLE, tokenizer, _encode_tag),
        system=lambda text, tokenizer: tokenizer.encode(f" {text}"),
        user=lambda text, tokenizer: tokenizer.encode(f" User: {text}."),
        generation_prompt=lambda tokenizer: tokenizer.encode(" Assistant:"),
        assistant=lambda text, tokenizer: _encode_tags(f" {text}", tokenizer, _encode_tag),
        jinja=jinja_templates.r1(R1_PREAMBLE),
    ),
    "checkpoint": CheckpointTemplate(),
}


def encode_prompt(
    messages: Messages, tokenizer: Tokenizer, template: str, tools: Tools | None = None
) -> list[int]:
    """Encodes a conversation whose next turn is the assistant's.

    The ids end where the assistant begins to write.

    Args:
      messages: the conversation so far.
      tokenizer: encodes it.
      template: a name in `TEMPLATES`.
      tools: JSON schemas of the functions that the assistant may call.

    Raises:
      UserError: the template cannot write the conversation. For "think" and "r1" the roles must
        take turns, and the last be the user's.
    """
    return _template(template).encode_prompt(messages, tokenizer, tools)


def encode_chat(
    messages: Messages,
    tokenizer: Tokenizer,
    template: str,
    tools: Tools | None = None,
    omitted: Omitted = refuse_to_learn,
    context: int = 0,
) -> tuple[list[int], list[float]]:
    """Encodes a whole conversation, with the weight of each id as a target.

    The weight is 1 for what the assistant writes, the id that ends its turn included, and else 0.
    With "checkpoint" a turn that the template does not leave as it was sampled is context, of
    weight 0: see `ChatTemplate.render_with_spans`.

    Args:
      messages: the conversation.
      tokenizer: encodes it.
      template: a name in `TEMPLATES`.
      tools: JSON schemas of the functions that the assistant may call.
      omitted: takes what the template leaves out; by default it is refused.
      context: how many of the first messages are no targets, whoever writes them.

    Returns:
      (ids, weights), lists of equal length.

    Raises:
      UserError: the template cannot write the conversation. For "think" and "r1" the roles must
        take turns, and the last be the assistant's.
    """
    return _template(template).encode_chat(messages, tokenizer, tools, omitted, context)


def spelled_out(template: str, tokenizer: Tokenizer) -> list[str]:
    """Returns the tags that a template writes as characters, for want of a special token.

    Only "r1" does.
    """
    if template != "r1":
        return []
    return [tag for tag in COMPLETION_TAGS if tokenizer.special_token_id(tag) is None]


def jinja_of(template: str) -> str | None:
    """Returns the Jinja of a template of ours, or None of "checkpoint", which has its own."""
    return getattr(_template(template), "jinja", None)


def _template(name: str) -> Template:
    if name not in TEMPLATES:
        raise UserError(f'data.chat_template = "{name}": must be one of {", ".join(TEMPLATES)}')
    return TEMPLATES[name]


def _checkpoint_template(tokenizer: Tokenizer) -> ChatTemplate:
    if tokenizer.chat_template is None:
        raise UserError(
            f'data.chat_template = "checkpoint": the tokenizer {tokenizer.name} has no chat '
            'template (no chat_template.jinja beside it, nor a "chat_template" in its '
            "tokenizer_config.json); put one there, or set data.chat_template to what the model"
            ' was trained on: "think", or "r1", which is plain text'
        )
    return tokenizer.chat_template


def _check_turns(messages: Messages, last_role: str) -> None:
    """Raises UserError unless the turns are [system] user assistant user ..., each with a text.

    The last of them must be of `last_role`.
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if message["role"] != expected:
            place = number + 1 + len(messages) - len(turns)
            raise UserError(
                f'message {place} of {len(messages)} has role "{message["role"]}" where '
                f'"{expected}" is due (user and assistant take turns)'
            )
    if not turns or turns[-1]["role"] != last_role:
        found = f', not "{turns[-1]["role"]}"' if turns else "; it is empty"
        raise UserError(f'the conversation must end with a message of role "{last_role}"{found}')
    for number, message in enumerate(messages, 1):
        if not isinstance(message.get("content"), str):
            raise UserError(
                f'message {number} of {len(messages)} has no text as "content", which only '
                'data.chat_template = "checkpoint" can write'
            )
