"""A checkpoint's own chat template: the Jinja program beside its tokenizer that writes a
conversation as text.

It is run as Hugging Face's `apply_chat_template(tokenize=False)` runs it, in the same sandbox with
the same filters, functions and variables, so that the text is the same to the character.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.documents import Messages, Tools
from errors import UserError

TEMPLATE_FILE = "chat_template.jinja"

# The names a message's thought goes by; Hugging Face gives it to templates under the first two,
# whichever it came under.
_THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")

# Tags of a thought, open, closed or both, at the end of a prompt: "<think>\n",
# "<think>\n\n</think>\n\n", "[THINK]".
_THOUGHT_TAGS = re.compile(r"(?:[<\[]/?(?:\w+:)?think(?:ing)?[>\]]\s*)+\Z", re.IGNORECASE)


class AssistantSpan(NamedTuple):
    """Characters start .. end - 1 of a rendering, which the assistant wrote as the message of this
    number, counted from 1.
    """

    number: int
    start: int
    end: int


@dataclass(frozen=True)
class ChatTemplate:
    """A template that has yet to be compiled: whoever does not chat never meets its errors.

    Attributes:
      source: the Jinja program.
      name: the file it is from, for errors.
      special_tokens: texts of the tokens the program may name, such as {"bos_token": "<s>"}.
    """

    source: str
    name: str
    special_tokens: Mapping[str, str]

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool,
        tools: Tools | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text.

        Args:
          messages: with whatever fields the template reads.
          add_generation_prompt: whether the text goes on to where the assistant begins to write.
          tools: JSON schemas of what the assistant may call.
          variables: the template's own switches, such as enable_thinking=False.

        Raises UserError if the template is wrong, or refuses the conversation.
        """
        if not messages:
            raise UserError(f"{self.name}: the conversation is empty")
        program = self._program
        given = {
            **self.special_tokens,
            **variables,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return program.render(
                messages=[_for_template(message) for message in messages], **given
            )
        except (
            Exception
        ) as error:  # the program is foreign, and may raise anything that Python does
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.name}: {self._refused(messages, given)}{reason}") from error

    def render_with_spans(self, messages: Messages, tools: Tools | None = None) -> tuple[str, list[AssistantSpan]]:
        """The whole conversation as text, and what the assistant wrote of it just as it would have
        been sampled.

        A turn counts from where its prompt ends (the messages before it, with the generation
        prompt) to where the rendering that ends with it does. It counts
        only if the whole begins with both: a turn that the template rewrites once others follow,
        dropping its thought, is context alone. The last turn may also lack the tags of a thought in
        which its prompt ends ("<think>", or an empty thought); it then counts from before those.

        Raises UserError if the last turn does not go on from its prompt even so, no message is the
        assistant's, or the template refuses the conversation.
        """
        text = self.render(messages, add_generation_prompt=False, tools=tools)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise UserError(
                f'{self.name}: none of the {len(messages)} messages has role "assistant"'
            )
        found = [
            self._turn(index, text, messages, tools, last=index == turns[-1])
            for index in turns
            if index > 0
        ]  # a greeting answers no prompt
        return text, [span for span in found if span is not None]

    def _turn(
        self, index: int, text: str, messages: Messages, tools: Tools | None, last: bool
    ) -> AssistantSpan | None:
        turn = (
            text
            if index == len(messages) - 1
            else self.render(messages[: index + 1], add_generation_prompt=False, tools=tools)
        )
        if not text.startswith(turn):
            return None
        prompt = self.render(messages[:index], add_generation_prompt=True, tools=tools)
        if last and not text.startswith(prompt):
            untagged = _THOUGHT_TAGS.sub("", prompt)
            if untagged == prompt or not text.startswith(untagged):
                end = json.dumps(prompt[-40:], ensure_ascii=False)
                raise UserError(
                    f"{self.name}: message {index + 1} of {len(messages)} is not written as its prompt would have it begin (which ends {end})"
                )
            prompt = untagged
        return (
            AssistantSpan(index + 1, len(prompt), len(turn))
            if text.startswith(prompt) and len(prompt) <= len(turn)
            else None
        )

    def _refused(self, messages: Messages, given: Mapping[str, Any]) -> str:
        """ "message 3 of 5: " for the one after the longest beginning that the template accepts; ""
        if it accepts none.
        """
        for count in range(len(messages) - 1, 0, -1):
            try:
                self._program.render(
                    messages=[_for_template(message) for message in messages[:count]], **given
                )
            except Exception:
                continue
            return f"message {count + 1} of {len(messages)}: "
        return ""

    @functools.cached_property
    def _program(self) -> jinja2.Template:
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{self.name}: line {error.lineno} of the chat template: {error.message}"
            ) from error


def find_chat_template(
    directory: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """The template beside a tokenizer: chat_template.jinja, or else "chat_template" of its
    tokenizer_config.json, of several the one named "default".

    Args:
      directory: where tokenizer.json is.
      config: what its tokenizer_config.json says.
      special_tokens: see `ChatTemplate`.
    """
    path = directory / TEMPLATE_FILE
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), str(path), special_tokens)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {error.start}") from error
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {named["name"]: named["template"] for named in source}.get("default")
    return (
        ChatTemplate(source, str(directory / "tokenizer_config.json"), special_tokens)
        if isinstance(source, str)
        else None
    )


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as Hugging Face hands it to a template: no field without a value, and the thought
    under each of the names that templates read.
    """
    given = {field: value for field, value in message.items() if value is not None}
    thought = next((given[field] for field in _THOUGHT_FIELDS if field in given), None)
    return (
        given if thought is None else {"thinking": thought} | given | {"reasoning_content": thought}
    )


class _Generation(Extension):
    """{% generation %}: marks what the assistant writes, for whoever asks; here it is a scope of
    its own, no more.
    """

    tags = {"generation"}  # noqa: RUF012 jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape <, > and & for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(reason: str) -> None:
    raise jinja2.TemplateError(reason)
