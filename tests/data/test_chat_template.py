"""Chat templates as text.

The literal renderings are what transformers 5.23 gave: apply_chat_template(tokenize=False) with the
same files and messages.
"""

import copy
import json

import pytest

from data.chat import encode_chat, encode_prompt
from data.config import DataConfig
from data.tokenizer_files import load_tokenizer
from data.tokenizer_training import bytes_tokenizer
from errors import UserError
from experiment.schema import Config, with_template_options
from tests.data.chats import THOUGHT, TOOL_USE, TOOLS, assistant, inline_template, user


@pytest.mark.parametrize(
    "name, messages, options, text",
    [
        (
            "chatml",  # the first thought is dropped, the second kept
            [user("q1"), assistant(THOUGHT), user("q2"), assistant(THOUGHT)],
            {},
            "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\nbecause<|im_end|>\n"
            "<|im_start|>user\nq2<|im_end|>\n"
            "<|im_start|>assistant\n<think>\nwhy\n</think>\n\nbecause<|im_end|>\n",
        ),
        (
            "chatml",  # content in parts; fields without a value count as absent
            [
                {"role": "system", "content": "Be short."},
                user([{"text": "q"}, {"text": "naïve 你"}]),
                assistant("hi", reasoning_content=None, tool_calls=None),
            ],
            {},
            "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nq naïve 你<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\nhi<|im_end|>\n",
        ),
        (
            # the thought comes as "reasoning" and as "thinking"; the template reads
            # "reasoning_content"
            "chatml",
            TOOL_USE,
            {"tools": TOOLS},
            '<|im_start|>system\nYou may call:\n{"type": "function", "function": {"name": "add", '
            '"description": "a < b & c"}}<|im_end|>\n'
            "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n<think>\nadd them\n</think>\n\n"
            '<tool_call>\n{"name": "add", "arguments": {"x": [1, 2], "y": [3, 4]}}\n</tool_call>'
            "<|im_end|>\n"
            "<|im_start|>user\n<tool_response>\n10\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n<think>\neasy\n</think>\n\n10<|im_end|>\n",
        ),
        (
            "chatml",
            [user("q1"), assistant(THOUGHT), user("q2")],
            {"add_generation_prompt": True},
            "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\nbecause<|im_end|>\n"
            "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
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
            "<｜begin▁of▁sentence｜><｜User｜>q1<｜Assistant｜>hi<｜end▁of▁sentence｜>"
            "<｜User｜>q2<｜Assistant｜>hi<｜end▁of▁sentence｜>",
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
            "[start]<|user|>\nq1<|assistant|>\n<think>w</think>\nhi"
            "<|user|>\nq2<|assistant|>\n<think></think>\nhi",
        ),
    ],
)
def test_renders_as_transformers_does(template, name, messages, options, text):
    before = copy.deepcopy(messages)
    given = {"add_generation_prompt": False} | options
    switches = {name: given.pop(name) for name in ("enable_thinking",) if name in given}
    assert template(name).with_options(switches).render(messages, **given) == text
    assert messages == before


def test_a_switch_that_a_template_does_not_read_is_refused(template):
    """A misspelt one would be no switch at all."""
    with pytest.raises(UserError, match=r'"enable_thinkin": no switch of .* enable_thinking,'):
        template("chatml").with_options({"enable_thinkin": False})
    for given in ("messages", "add_generation_prompt"):
        with pytest.raises(UserError, match=f'"{given}": no switch'):
            template("chatml").with_options({given: []})


def test_a_switch_reaches_prompts_and_conversations(checkpoint):
    """As `data.chat_template_options` and `--template_options` set it."""
    plain = load_tokenizer(checkpoint("chatml"))
    config = with_template_options(
        Config(data=DataConfig(chat_template="checkpoint")), '{"enable_thinking": false}'
    )
    switched = plain.with_template_options(config.data.template_options or {})
    prompts = [encode_prompt([user("q")], each, "checkpoint") for each in (plain, switched)]
    assert plain.decode(prompts[1][len(prompts[0]) :]) == "<think>\n\n</think>\n\n"
    assert prompts[1][: len(prompts[0])] == prompts[0]
    assert plain.with_template_options({}) is plain
    with pytest.raises(UserError, match=r"no chat template, so no data\.chat_template_options"):
        bytes_tokenizer().with_template_options({"enable_thinking": False})


def test_a_checkpoint_without_a_template_asks_for_one(checkpoint):
    """Ours are not taken in its place: its model was trained on none of them."""
    tokenizer = load_tokenizer(checkpoint(None))
    for encode in (encode_prompt, encode_chat):
        with pytest.raises(UserError) as error:
            encode(
                [user("q"), assistant("a")][: 1 + (encode is encode_chat)], tokenizer, "checkpoint"
            )
        line = str(error.value)
        assert "no chat template" in line and "set data.chat_template to what the model" in line


def test_templates_have_the_functions_and_filters_of_transformers():
    """Blocks take their line end and indent with them; {% generation %} only opens a scope."""
    source = """{% set found = 'outside' %}
    {% for message in messages %}
        {% if loop.index > 1 %}{% break %}{% endif %}
        {{ message.content | tojson }}
    {% endfor %}
    {% generation %}{% set found = 'inside' %}{{ found }} {% endgeneration %}
{{ found }} {{ {'é<': [1]} | tojson }} {{
    {'b': 1, 'a': 'é'}
    | tojson(ensure_ascii=True, sort_keys=True, indent=1, separators=(',', ':'))
}}
{{ strftime_now('%Y')[:2] }} {{ bos_token }} {{ eos_token }}{{ tools is none }}
{{ documents is none }}
"""
    text = inline_template(source, bos_token="<s>").render(
        [user("<a>"), user("b")], add_generation_prompt=False
    )
    assert text == (
        '        "<a>"\ninside outside {"é<": [1]} {\n "a":"\\u00e9",\n "b":1\n}\n20 <s> True\nTrue'
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
            "{% for message in messages %}{% if loop.index == 2 %}"
            "{{ raise_exception('no\nmore') }}{% endif %}{% endfor %}",
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
        inline_template(source).render(
            [user("a"), user("b"), user([])], add_generation_prompt=False
        )
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_empty_conversation_is_refused():
    with pytest.raises(UserError, match=r"chat_template.jinja: the conversation is empty"):
        inline_template("").render([], add_generation_prompt=True)


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
def test_a_template_is_a_file_or_in_the_tokenizers_config(checkpoint, files, source):
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
