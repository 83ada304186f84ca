"""Chat templates as text. The literal renderings are what transformers 5.23 gave:
apply_chat_template(tokenize=False) with the same files and messages.
"""

import copy
import json

import pytest

from data.chat_template import ChatTemplate
from data.tokenizer import load_tokenizer
from errors import UserError


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


THOUGHT = "<think>\nwhy\n</think>\n\nbecause"
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"x": [1, 2], "y": [3, 4]}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b & c"}}]
TOOL_USE = [
    user("q1"),
    {"role": "assistant", "reasoning": "add them", "tool_calls": CALL},
    {"role": "tool", "content": "10"},
    assistant("10", thinking="easy"),
]
CONFIGS = {
    "chatml": {"eos_token": "<|im_end|>"},
    "r1": {
        "bos_token": {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>"},
        "eos_token": "<｜end▁of▁sentence｜>",
    },
    "speaker": {"eos_token": "<|endoftext|>"},
}


@pytest.fixture
def template(checkpoint):
    """Call it with a name of tests/data/templates."""
    return lambda name: load_tokenizer(checkpoint(name, CONFIGS[name])).chat_template


def inline(source, **special_tokens) -> ChatTemplate:
    return ChatTemplate(source, "chat_template.jinja", special_tokens)


@pytest.mark.parametrize(
    "name, messages, given, text",
    [
        (
            "chatml",  # the first thought is dropped, the second kept
            [user("q1"), assistant(THOUGHT), user("q2"), assistant(THOUGHT)],
            {},
            "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\nbecause<|im_end|>\n"
            "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n<think>\nwhy\n</think>\n\nbecause<|im_end|>\n",
        ),
        (
            "chatml",  # content in parts; fields without a value count as absent
            [
                {"role": "system", "content": "Be short."},
                user([{"text": "q"}, {"text": "naïve 你"}]),
                assistant("hi", reasoning_content=None, tool_calls=None),
            ],
            {},
            "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nq naïve 你<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nhi<|im_end|>\n",
        ),
        (
            # the thought comes as "reasoning" and as "thinking"; the template reads
            # "reasoning_content"
            "chatml",
            TOOL_USE,
            {"tools": TOOLS},
            '<|im_start|>system\nYou may call:\n{"type": "function", "function": {"name": "add", "description": "a < b & c"}}<|im_end|>\n'
            "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n<think>\nadd them\n</think>\n\n"
            '<tool_call>\n{"name": "add", "arguments": {"x": [1, 2], "y": [3, 4]}}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\n<tool_response>\n10\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\neasy\n</think>\n\n10<|im_end|>\n",
        ),
        (
            "chatml",
            [user("q1"), assistant(THOUGHT), user("q2")],
            {"add_generation_prompt": True},
            "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\nbecause<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "chatml",
            [user("q")],
            {"add_generation_prompt": True, "enable_thinking": False},
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (
            "r1",
            [user("q1"), assistant("<think>\nw\n</think>\n\nhi"), user("q2"), assistant("hi")],
            {},
            "<｜begin▁of▁sentence｜><｜User｜>q1<｜Assistant｜>hi<｜end▁of▁sentence｜><｜User｜>q2<｜Assistant｜>hi<｜end▁of▁sentence｜>",
        ),
        (
            "r1",
            [user("q1")],
            {"add_generation_prompt": True},
            "<｜begin▁of▁sentence｜><｜User｜>q1<｜Assistant｜><think>\n",
        ),
        (
            "speaker",
            [
                {"role": "system", "content": ""},
                user("q1"),
                assistant("hi", reasoning_content="w"),
                user("q2"),
                assistant("hi"),
            ],
            {},
            "[start]<|user|>\nq1<|assistant|>\n<think>w</think>\nhi<|user|>\nq2<|assistant|>\n<think></think>\nhi",
        ),
    ],
)
def test_renders_as_transformers_does(template, name, messages, given, text):
    before = copy.deepcopy(messages)
    assert template(name).render(messages, **{"add_generation_prompt": False, **given}) == text
    assert messages == before


def test_what_templates_may_use():
    """Each line is of jinja's sandbox as transformers sets it up: blocks take their line end and
    indent with them, {% generation %} is a scope of its own.
    """
    source = """{% set found = 'outside' %}
    {% for message in messages %}
        {% if loop.index > 1 %}{% break %}{% endif %}
        {{ message.content | tojson }}
    {% endfor %}
    {% generation %}{% set found = 'inside' %}{{ found }} {% endgeneration %}
{{ found }} {{ {'é<': [1]} | tojson }} {{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=True, sort_keys=True, indent=1, separators=(',', ':')) }}
{{ strftime_now('%Y')[:2] }} {{ bos_token }} {{ eos_token }}{{ tools is none }} {{ documents is none }}
"""
    text = inline(source, bos_token="<s>").render(
        [user("<a>"), user("b")], add_generation_prompt=False
    )
    assert (
        text
        == '        "<a>"\ninside outside {"é<": [1]} {\n "a":"\\u00e9",\n "b":1\n}\n20 <s> True True'
    )


@pytest.mark.parametrize(
    "source, words",
    [
        ("{% for message in messages %}", "chat_template.jinja: line 1 of the chat template: "),
        (
            "\n\n{{ messages | no_such_filter }}",
            "chat_template.jinja: line 3 of the chat template: No filter named 'no_such_filter'",
        ),
        (
            "{% for message in messages %}{% if loop.index == 2 %}{{ raise_exception('no\nmore') }}{% endif %}{% endfor %}",
            "message 2 of 3: no more",
        ),
        (
            "{% for message in messages %}{{ message.tool.name }}{% endfor %}",
            "chat_template.jinja: 'dict object' has no attribute 'tool'",
        ),
        (
            "{% for message in messages %}{{ '#' + message.content }}{% endfor %}",
            'message 3 of 3: can only concatenate str (not "list") to str',
        ),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{{ messages.append(1) }}", "attribute 'append' of 'list' object is unsafe"),
    ],
)
def test_a_bad_template_is_one_line(source, words):
    with pytest.raises(UserError) as error:
        inline(source).render([user("a"), user("b"), user([])], add_generation_prompt=False)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_empty_conversation():
    with pytest.raises(UserError, match=r"chat_template.jinja: the conversation is empty"):
        inline("").render([], add_generation_prompt=True)


@pytest.mark.parametrize(
    "files, source",
    [
        ({"chat_template.jinja": "A", "tokenizer_config.json": {"chat_template": "B"}}, "A"),
        ({"tokenizer_config.json": {"chat_template": "B"}}, "B"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "C"},
                        {"name": "default", "template": "D"},
                    ]
                }
            },
            "D",
        ),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "C"}]}},
            None,
        ),
        ({"additional_chat_templates/rag.jinja": "E"}, None),
        ({}, None),
    ],
)
def test_where_a_template_is_found(checkpoint, files, source):
    directory = checkpoint(None)
    (directory / "additional_chat_templates").mkdir()
    for name, content in files.items():
        (directory / name).write_text(
            content
            if isinstance(content, str)
            else json.dumps(content | {"eos_token": "<|im_end|>"})
        )
    found = load_tokenizer(directory).chat_template
    assert (found and found.source) == source
    assert load_tokenizer(directory / "tokenizer.json").chat_template == found


@pytest.mark.parametrize(
    "listed, bos", [({}, "<|user|>"), ({"added_tokens_decoder": {}}, "<|system|>")]
)
def test_the_older_map_of_special_tokens_counts_unless_the_config_lists_tokens(
    checkpoint, listed, bos
):
    config = {
        "bos_token": "<|system|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": True,
        "unk_token": None,
        **listed,
    }
    tokenizer = load_tokenizer(
        checkpoint("r1", config, special_tokens_map={"bos_token": {"content": "<|user|>"}})
    )
    assert tokenizer.chat_template.special_tokens == {"bos_token": bos, "eos_token": "<|im_end|>"}
    assert tokenizer.bos == tokenizer.special_token_id(bos)


def written(template, messages, tools=None):
    text, spans = template.written(messages, tools)
    assert text == template.render(messages, add_generation_prompt=False, tools=tools)
    return [(span.number, text[span.start : span.end]) for span in spans]


def test_a_turn_that_keeps_its_thought_counts(template):
    """Both turns are behind the last question."""
    first = '<think>\nadd them\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"x": [1, 2], "y": [3, 4]}}\n</tool_call><|im_end|>\n'
    assert written(template("chatml"), TOOL_USE, TOOLS) == [
        (2, first),
        (4, "<think>\neasy\n</think>\n\n10<|im_end|>\n"),
    ]


def test_a_turn_that_loses_its_thought_is_context(template):
    messages = [user("q1"), assistant(THOUGHT), user("q2"), assistant(THOUGHT)]
    assert written(template("chatml"), messages) == [
        (4, "<think>\nwhy\n</think>\n\nbecause<|im_end|>\n")
    ]
    assert written(template("chatml"), [*messages, user("q3")]) == []


def test_a_thought_opened_by_the_prompt_alone(template):
    """What is left of the last turn counts from where the prompt's tag would stand; an earlier
    turn, which was sampled behind it, is context.
    """
    assert written(
        template("r1"), [user("q1"), assistant("a1"), user("q2"), assistant(THOUGHT)]
    ) == [(4, "because<｜end▁of▁sentence｜>")]


PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}|{% endfor %}{% if add_generation_prompt %}{{ cue }}{% endif %}"


@pytest.mark.parametrize(
    "cue, content, counts",
    [
        ("assistant: <think>\n", "a", "a|"),
        (
            "assistant: <think>\n",
            THOUGHT,
            "why\n</think>\n\nbecause|",
        ),  # the plain case: the turn begins as its prompt ends
        ("assistant: <think>\n\n</think>\n\n", "a", "a|"),
        (
            "assistant: <think>\n\n</think>\n\n",
            THOUGHT,
            THOUGHT + "|",
        ),  # all of the thought, though it begins like the prompt's empty one
        ("assistant: </think>", "a", "a|"),
        ("assistant: [THINK]", "a", "a|"),
        ("assistant: <seed:think>", "a", "a|"),
        ("", "a", "assistant: a|"),  # without a cue the assistant is to write its own name
    ],
)
def test_tags_of_a_thought_that_only_the_prompt_has(cue, content, counts):
    assert written(inline(PLAIN, cue=cue), [user("q"), assistant(content)]) == [(2, counts)]


@pytest.mark.parametrize("cue", ["bot: ", "assistant: \n", "assistant: I think", "bot: <think>"])
def test_a_turn_that_does_not_follow_its_prompt(cue):
    with pytest.raises(UserError) as error:
        inline(PLAIN, cue=cue).render_with_spans([user("q"), assistant("a")])
    end = json.dumps(f"user: q|{cue}")
    assert (
        str(error.value)
        == f"chat_template.jinja: message 2 of 2 is not written as its prompt would have it begin (which ends {end})"
    )


def test_a_greeting_answers_no_prompt(template):
    assert written(
        inline("{% for m in messages %}{{ m.content }}|{% endfor %}"),
        [assistant("hello"), user("q"), assistant("a")],
    ) == [(3, "a|")]
    with pytest.raises(UserError, match='none of the 1 messages has role "assistant"'):
        template("chatml").written([user("q")])
