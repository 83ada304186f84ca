"""Messages and templates of conversations, shared by the tests of chat."""

from data.chat_template import ChatTemplate


def user(content):
    """Returns a user's message."""
    return {"role": "user", "content": content}


def assistant(content, **fields):
    """Returns a message of the assistant with further fields, such as a thought."""
    return {"role": "assistant", "content": content, **fields}


def inline_template(source, **special_tokens) -> ChatTemplate:
    """Returns a template with this source."""
    return ChatTemplate(source, "chat_template.jinja", special_tokens)


THOUGHT = "<think>\nwhy\n</think>\n\nbecause"
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"x": [1, 2], "y": [3, 4]}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b & c"}}]
TOOL_USE = [
    user("q1"),
    {"role": "assistant", "reasoning": "add them", "tool_calls": CALL},
    {"role": "tool", "content": "10"},
    assistant("10", thinking="easy"),
]
