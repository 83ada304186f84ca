"""What a chat template leaves out of a conversation.

Some templates drop a thought, or know nothing of tool calls. What is left would be learnt as if it
were all that the assistant said, so every rendering is compared with its messages. White space does
not count, nor do the tags around a thought, which templates spell in their own way.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data.documents import Messages, Tools
from errors import UserError

# Takes a line that says what a template leaves out of a conversation. Where it returns, the turn
# has weight 0, and so has every turn behind a message or a tool that is left out.
Omitted = Callable[[str], None]

# The fields in which a message may have the assistant's thought.
THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")
CALL_FIELDS = ("tool_calls", "function_call")

# A tag of a thought: "<think>", "</think>", "[THINK]", "<seed:think>".
THOUGHT_TAG = r"[<\[]/?(?:\w+:)?think(?:ing)?[>\]]"

_SHOWN = 40  # characters of what is left out that an error repeats


def squeezed(text: str) -> str:
    """Returns a text without its white space."""
    return "".join(text.split())


def omission(message: Mapping[str, Any], written: str) -> str | None:
    """Returns what a template leaves out of a message, in words, or None if all is there.

    Thought and content must be there in this order, tool calls anywhere: the name of each function,
    and each name and value of its arguments.

    Args:
      message: the message, with all its fields.
      written: what the template wrote of it, `squeezed`.
    """
    reached = 0
    for field, piece, gap in _pieces(message):
        at, end = _find(piece, written, reached + gap)
        if at < 0:
            return _words(field, piece)
        reached = end
    for field in CALL_FIELDS:
        for word in _call_words(message.get(field), written):
            if _find(word, written, 0)[0] < 0:
                return _words(field, word)
    return None


def omitted_tool(tools: Tools | None, written: str) -> str | None:
    """Returns the name of the first tool that a squeezed text does not mention, or None."""
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and squeezed(name) not in written:
            return name
    return None


def thought_of(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the field that has a message's thought, and the thought, or None if none has."""
    for field in THOUGHT_FIELDS:
        if isinstance(message.get(field), str) and message[field].strip():
            return field, message[field]
    return None


def calls_of(message: Mapping[str, Any]) -> str | None:
    """Returns the field by which a message calls tools, or None if it calls none."""
    return next((field for field in CALL_FIELDS if message.get(field)), None)


def _pieces(message: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Yields the parts of a message's text, in order: field, text, and the least gap before it.

    A thought in tags is a part of its own: where the tags are gone, something else must stand.
    """
    thought = thought_of(message)
    if thought is not None:
        yield *thought, 0
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            gap = 0
            for piece in re.split(THOUGHT_TAG, text, flags=re.IGNORECASE):
                if piece.strip():
                    yield "content", piece, gap
                    gap = 1


def _call_words(calls: Any, written: str) -> Iterator[str]:
    """Yields the names of the functions that are called, and the names and values they are given.

    Arguments in a string are one word if that is written as it is; else JSON in it is read.
    """
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(function, dict):
            continue
        if isinstance(function.get("name"), str):
            yield function["name"]
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str) and squeezed(arguments) not in written:
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        yield from _leaves(arguments)


def _leaves(value: Any) -> Iterator[str]:
    """Yields the names and values in a JSON value, each as a text."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield str(name)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


def _find(piece: str, written: str, start: int) -> tuple[int, int]:
    """Returns where a piece begins and ends in a text, as it is or as JSON writes it; or (-1, -1).

    A template may hand a text on through `tojson`.
    """
    spellings = (piece, json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1])
    for spelling in dict.fromkeys(map(squeezed, spellings)):
        at = written.find(spelling, start)
        if at >= 0:
            return at, at + len(spelling)
    return -1, -1


def _words(field: str, piece: str) -> str:
    text = " ".join(piece.split())
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return f'"{field}" ({json.dumps(shown, ensure_ascii=False)})'


def refuse_to_learn(omitted: str) -> None:
    """Raises UserError for what a template leaves out of a conversation to learn."""
    raise UserError(
        f"{omitted}; take another data.chat_template, or give the turn no weight by"
        ' data.incomplete_turns = "mask"'
    )


def refuse_to_ask(omitted: str) -> None:
    """Raises UserError for what a template leaves out of a prompt."""
    raise UserError(f"{omitted}; take another data.chat_template")


def omitted_words(number: int, count: int, what: str) -> str:
    """Writes what a template leaves out of one of `count` messages."""
    return f"message {number} of {count}: the chat template leaves out its {what}"


def last_message_with_context(
    messages: Messages, tools: Tools | None, text: str, omitted: Omitted
) -> int:
    """Returns the number of the last message before which nothing is left out of the context.

    What the assistant says counts where it is learnt, and not here.
    """
    written = squeezed(text)
    tool = omitted_tool(tools, written)
    if tool is not None:
        omitted(f'the chat template leaves out the tool "{tool}"')
        return 0
    for number, message in enumerate(messages, 1):
        left_out = None if message["role"] == "assistant" else omission(message, written)
        if left_out is not None:
            omitted(omitted_words(number, len(messages), left_out))
            return number
    return len(messages)
