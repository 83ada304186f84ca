"""The templates "think" and "r1" as Jinja, for whoever reads an exported checkpoint.

`data/chat.py` says what they write. Here special tokens are matched in the text, as in any
checkpoint's template: a user's "<|assistant|>" too.
"""

_THOUGHT = "{{ ('<think>' + m.reasoning_content + '</think>') if m.reasoning_content }}"

THINK = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|assistant|>" + _THOUGHT + "{{ m.content + eos_token }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def r1(preamble: str) -> str:
    """Returns the template "r1", which begins with the preamble of arXiv 2501.12948, table 1."""
    return (
        f"{preamble}"
        "{% for m in messages %}"
        "{% if m.role == 'user' %} User: {{ m.content }}."
        "{% elif m.role == 'assistant' %} Assistant: " + _THOUGHT + "{{ m.content + eos_token }}"
        "{% else %} {{ m.content }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %} Assistant:{% endif %}"
    )
