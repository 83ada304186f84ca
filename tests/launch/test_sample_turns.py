"""launch.sample chats: the model answers with the whole conversation in sight."""

import pytest

from data.chat import encode_chat, encode_prompt
from data.tokenizer_training import bytes_tokenizer
from errors import UserError
from experiment.schema import Config
from launch import sample

TOKENIZER = bytes_tokenizer()
ANSWERS = ("<think>1+1=2</think><answer>2</answer>", "3", "4")


def ids_of(answer: str) -> list[int]:
    """Returns the ids of an answer as the model would sample them, tags as ids of their own."""
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": answer}]
    before = len(encode_prompt(messages[:1], TOKENIZER, "think"))
    return encode_chat(messages, TOKENIZER, "think")[0][before:-1]


def prompts_of(turns, system: str = "", template: str = "think") -> list[list[int]]:
    """Returns the prompts of a model that gives ANSWERS."""
    prompts, answers = [], iter(ANSWERS)

    def complete(ids: list[int]) -> list[int]:
        prompts.append(ids)
        return ids_of(f" {next(answers)}" if template == "r1" else next(answers))

    sample.converse(complete, turns, system, TOKENIZER, template)
    return prompts


def asked(*contents: str, system: str = "", template: str = "think") -> list[int]:
    """Returns the prompt of a conversation in which the user and the assistant take turns."""
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return encode_prompt(messages, TOKENIZER, template)


@pytest.mark.parametrize("template", ["think", "r1"])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_a_turn_sees_those_before(system, template):
    words = {"system": system, "template": template}
    assert prompts_of(["1+1?", "and 1?", "and 1?"], **words) == [
        asked("1+1?", **words),
        asked("1+1?", ANSWERS[0], "and 1?", **words),
        asked("1+1?", ANSWERS[0], "and 1?", ANSWERS[1], "and 1?", **words),
    ]


def test_an_empty_line_begins_another_conversation():
    words = {"system": "Be brief."}
    assert prompts_of(["1+1?", "", "", "2+1?"], **words) == [
        asked("1+1?", **words),
        asked("2+1?", **words),
    ]


@pytest.mark.parametrize("flags", [{"prompt": "a"}, {"infill": True}])
def test_a_system_is_for_a_chat(flags, tmp_path):
    given = {"prompt": "", "chat": (), "infill": False, "prefix": "", "suffix": ""} | flags
    with pytest.raises(UserError, match=r"--system goes with --chat"):
        sample.run(Config(), tmp_path, system="x", **given)
