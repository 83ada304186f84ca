"""Conversations to ids. A template is how turns are told apart; which tokens count as targets follows from it.

    think   <|user|>question<|assistant|><think>thought</think><answer>answer</answer><|eos|>
    r1      the prompt of DeepSeek-R1-Zero (arXiv 2501.12948, table 1), then " <think>...", then <|eos|>

Markers are special ids if the tokenizer has them, and plain text if not. Text of users and systems is never read for markers.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from data.documents import Messages
from data.tokenizer import TAGS, Tokenizer
from errors import UserError

R1_PREAMBLE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first thinks about the reasoning process "
    "in the mind and then provides the user with the answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)

_TAG = re.compile("(" + "|".join(re.escape(tag) for tag in TAGS) + ")")


@dataclass(frozen=True)
class Template:
    """How one message is written. Each function returns ids; `assistant` only what the assistant itself writes, `cue` what makes it speak."""

    opening: Callable[[Tokenizer], list[int]]
    system: Callable[[str, Tokenizer], list[int]]
    user: Callable[[str, Tokenizer], list[int]]
    cue: Callable[[Tokenizer], list[int]]
    assistant: Callable[[str, Tokenizer], list[int]]


def encode_tags(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text whose <think>, </think>, <answer>, </answer> become special ids where the tokenizer has them."""
    return [index for part in _TAG.split(text) if part for index in (_marker(part, tokenizer) if part in TAGS else tokenizer.encode(part))]


def _marker(text: str, tokenizer: Tokenizer) -> list[int]:
    special = tokenizer.special(text)
    return tokenizer.encode(text) if special is None else [special]


TEMPLATES = {
    "think": Template(
        opening=lambda tokenizer: [],
        system=lambda text, tokenizer: tokenizer.encode(text),
        user=lambda text, tokenizer: _marker("<|user|>", tokenizer) + tokenizer.encode(text),
        cue=lambda tokenizer: _marker("<|assistant|>", tokenizer),
        assistant=encode_tags,
    ),
    "r1": Template(
        opening=lambda tokenizer: encode_tags(R1_PREAMBLE, tokenizer),
        system=lambda text, tokenizer: tokenizer.encode(f" {text}"),
        user=lambda text, tokenizer: tokenizer.encode(f" User: {text}."),
        cue=lambda tokenizer: tokenizer.encode(" Assistant:"),
        assistant=lambda text, tokenizer: encode_tags(f" {text}", tokenizer),
    ),
}


def encode_prompt(messages: Messages, tokenizer: Tokenizer, template: str) -> list[int]:
    """Ids of a conversation whose next turn is the assistant's; they end where it begins to write.

    Raises UserError if the roles do not take turns, or the last is not the user's.
    """
    _check_turns(messages, last="user")
    return _encode(messages, tokenizer, template)[0]


def encode_chat(messages: Messages, tokenizer: Tokenizer, template: str) -> tuple[list[int], list[float]]:
    """Ids of a whole conversation, and the weight of each as a target: 1 for what the assistant writes, its final [eos] included, else 0.

    Raises UserError if the roles do not take turns, or the last is not the assistant's.
    """
    _check_turns(messages, last="assistant")
    return _encode(messages, tokenizer, template)


def _encode(messages: Messages, tokenizer: Tokenizer, template: str) -> tuple[list[int], list[float]]:
    if template not in TEMPLATES:
        raise UserError(f'data.template = "{template}": must be one of {", ".join(TEMPLATES)}')
    written = TEMPLATES[template]
    ids = written.opening(tokenizer)
    weights = [0.0] * len(ids)
    for message in messages:
        if message["role"] == "assistant":
            added, weight = written.assistant(message["content"], tokenizer) + [tokenizer.eos], 1.0
        elif message["role"] == "user":
            added, weight = written.user(message["content"], tokenizer) + written.cue(tokenizer), 0.0
        else:
            added, weight = written.system(message["content"], tokenizer), 0.0
        ids += added
        weights += [weight] * len(added)
    return ids, weights


def _check_turns(messages: Messages, last: str) -> None:
    """Raises UserError unless the turns are [system] user assistant user ... , the last as asked for."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if message["role"] != expected:
            place = number + 1 + len(messages) - len(turns)
            raise UserError(f'message {place} of {len(messages)} has role "{message["role"]}" where "{expected}" is due (user and assistant take turns)')
    if not turns or turns[-1]["role"] != last:
        raise UserError(f'the conversation must end with a message of role "{last}"' + (f', not "{turns[-1]["role"]}"' if turns else "; it is empty"))


@dataclass(frozen=True)
class Parsed:
    """A completion taken apart. `thought` and `answer` are "" unless it is well formed."""

    thought: str
    answer: str
    well_formed: bool


def parse_completion(text: str) -> Parsed:
    """Strict: one <think> block, then one <answer> block, and nothing else but space around them; tags inside a block do not pass."""
    found = re.fullmatch(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", text, flags=re.DOTALL)
    if found is None or any(_TAG.search(block) for block in found.groups()):
        return Parsed("", "", False)
    return Parsed(found[1].strip(), found[2].strip(), True)
