"""A checkpoint's own chat template: the Jinja program that writes a conversation as text.

It is a file beside the tokenizer, and runs as Hugging Face's `apply_chat_template(tokenize=False)`
runs it (data/chat_jinja.py), in a process of its own (data/jinja_process.py).
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data.chat_omissions import THOUGHT_FIELDS, THOUGHT_TAG
from data.documents import Messages, Tools
from data.jinja_process import JINJA, Refused
from errors import UserError

TEMPLATE_FILE = "chat_template.jinja"

# Tags of a thought, open, closed or both, at the end of a prompt: "<think>\n",
# "<think>\n\n</think>\n\n", "[THINK]".
_THOUGHT_TAGS = re.compile(rf"(?:{THOUGHT_TAG}\s*)+\Z", re.IGNORECASE)


# What every template is given; its switches have other names.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception"}
_GIVEN |= {"strftime_now", "namespace", "range", "dict", "cycler", "joiner", "lipsum"}


class AssistantSpan(NamedTuple):
    """Characters start .. end - 1 of a rendered conversation, which the assistant wrote.

    `message` is the number of their message, from 1.
    """

    message: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template, which is compiled when it is first used.

    So its errors appear only where conversations are written.

    Attributes:
      source: the Jinja program.
      name: the file it is from, for errors.
      special_tokens: texts of the tokens the program may name, such as {"bos_token": "<s>"}.
      options: the program's own switches, such as {"enable_thinking": False}.
    """

    source: str
    name: str
    special_tokens: Mapping[str, str]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def with_options(self, options: Mapping[str, Any]) -> "ChatTemplate":
        """Returns this template with these switches set.

        Raises UserError for one that the program does not read.
        """
        try:
            read = JINJA.ask(("names", self.source)) - _GIVEN
        except Refused as error:
            raise UserError(f"{self.name}: {error}") from error
        for name in options:
            if name not in read:
                known = ", ".join(sorted(read - {*self.special_tokens})) or "none"
                raise UserError(
                    f'data.chat_template_options: "{name}": no switch of {self.name} (it reads:'
                    f" {known})"
                )
        return dataclasses.replace(self, options=dict(options))

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool,
        tools: Tools | None = None,
    ) -> str:
        """Writes a conversation as text.

        Args:
          messages: the conversation, with whatever fields the template reads.
          add_generation_prompt: whether the text goes on to where the assistant begins to write.
          tools: JSON schemas of the functions that the assistant may call.

        Raises:
          UserError: the conversation is empty, the template is wrong, or it refuses the
            conversation.
        """
        if not messages:
            raise UserError(f"{self.name}: the conversation is empty")
        context = {
            **self.special_tokens,
            **self.options,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._rendered(messages, context)
        except Refused as error:
            place = self._refused_message(messages, context) if error.by_conversation else ""
            raise UserError(f"{self.name}: {place}{error}") from error

    def _rendered(self, messages: Messages, context: Mapping[str, Any]) -> str:
        """Returns the text of a conversation. Raises Refused if the program gives none."""
        return JINJA.ask(("render", self.source, {**context, "messages": _for_template(messages)}))

    def render_with_spans(
        self, messages: Messages, tools: Tools | None = None
    ) -> tuple[str, list[AssistantSpan]]:
        """Writes a conversation as text, with the spans that are as the assistant sampled them.

        A turn of the assistant spans from where its prompt ends (the rendering of the messages
        before it, with the generation prompt) to where the rendering that ends with it does. It
        counts only if the whole text begins with both: a turn that the template rewrites once
        others follow, for example by dropping its thought, is context alone. The last turn may also
        lack the tags of a thought with which its prompt ends ("<think>", or an empty thought); it
        then spans from before those.

        Returns:
          (text, the spans of the turns that count, in order).

        Raises:
          UserError: the last turn does not go on from its prompt even so, no message is the
            assistant's, or the template refuses the conversation.
        """
        text = self.render(messages, add_generation_prompt=False, tools=tools)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise UserError(
                f'{self.name}: none of the {len(messages)} messages has role "assistant"'
            )
        spans = [
            self._assistant_span(index, text, messages, tools, is_last=index == turns[-1])
            for index in turns
            if index > 0  # a greeting answers no prompt
        ]
        return text, [span for span in spans if span is not None]

    def _assistant_span(
        self, index: int, text: str, messages: Messages, tools: Tools | None, is_last: bool
    ) -> AssistantSpan | None:
        """Returns the span of one turn in `text`, or None if it is not as it was sampled."""
        if index == len(messages) - 1:
            up_to_turn = text
        else:
            up_to_turn = self.render(
                messages[: index + 1], add_generation_prompt=False, tools=tools
            )
        if not text.startswith(up_to_turn):
            return None
        prompt = self.render(messages[:index], add_generation_prompt=True, tools=tools)
        if is_last and not text.startswith(prompt):
            untagged = _THOUGHT_TAGS.sub("", prompt)
            if untagged == prompt or not text.startswith(untagged):
                end = json.dumps(prompt[-40:], ensure_ascii=False)
                raise UserError(
                    f"{self.name}: message {index + 1} of {len(messages)} is not written as its "
                    f"prompt would have it begin (which ends {end})"
                )
            prompt = untagged
        if not text.startswith(prompt) or len(prompt) > len(up_to_turn):
            return None
        return AssistantSpan(index + 1, len(prompt), len(up_to_turn))

    def _refused_message(self, messages: Messages, context: Mapping[str, Any]) -> str:
        """Names the message after the longest beginning that the template accepts.

        Returns:
          "message 3 of 5: ", or "" if the template accepts no beginning.
        """
        for count in range(len(messages) - 1, 0, -1):
            try:
                self._rendered(messages[:count], context)
            except Refused:
                continue
            return f"message {count + 1} of {len(messages)}: "
        return ""


def find_chat_template(
    directory: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """Finds the chat template beside a tokenizer, or returns None if there is none.

    It is chat_template.jinja, or else "chat_template" of the tokenizer_config.json; of several
    there it is the one named "default".

    Args:
      directory: the directory of the tokenizer.json.
      config: the content of its tokenizer_config.json.
      special_tokens: as in `ChatTemplate`.

    Raises:
      UserError: chat_template.jinja is not UTF-8, or a list of templates is none.
    """
    path = directory / TEMPLATE_FILE
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), str(path), special_tokens)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {error.start}") from error
    source = config.get("chat_template")
    if isinstance(source, list):
        named = [one for one in source if isinstance(one, dict)]
        if len(named) < len(source) or not all({"name", "template"} <= set(one) for one in named):
            raise UserError(
                f'{directory / "tokenizer_config.json"}: "chat_template": a list must have objects'
                ' with a "name" and a "template" each'
            )
        source = next((one["template"] for one in named if one["name"] == "default"), None)
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, str(directory / "tokenizer_config.json"), special_tokens)


def _for_template(messages: Messages) -> Messages:
    """Returns messages as Hugging Face hands them to a template.

    A message has no field without a value, and its thought under each name that templates read.
    """
    prepared = []
    for message in messages:
        fields = {name: value for name, value in message.items() if value is not None}
        # Hugging Face gives a thought to templates under these two names, whichever it came in.
        thought = next((fields[name] for name in THOUGHT_FIELDS if name in fields), None)
        if thought is not None:
            fields = {"thinking": thought} | fields | {"reasoning_content": thought}
        prepared.append(fields)
    return prepared
