"""A chat template may hang, fill the memory or nest without an end: that is one line."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import jinja_process
from errors import UserError
from tests.data.chats import inline_template, user

LOOP = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
BOMBS = {
    "a loop without an end": (LOOP, "takes more than 1 seconds"),
    "a long text": ("{{ 'x' * (2 ** 25) }}", "the template "),  # writes too much, or for too long
    "a text that fills the memory": ("{{ 'x' * (2 ** 40) }}", "GiB of memory"),
    "a text that doubles": (
        "{% set n = namespace(s='x' * 1000) %}{% for i in range(60) %}"
        "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "the template takes more than",
    ),
    "a padded text": ("{{ 'x'.ljust(10 ** 12) }}{{ 'x' | center(10 ** 12) }}", "GiB of memory"),
    "a power": ("{{ 10 ** (messages | length * 10 ** 10) }}", "takes more than 1 seconds"),
    "a macro that calls itself": (
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "calls itself without an end",
    ),
    "deep brackets": ("{{ " + "(" * 20_000 + ")" * 20_000 + " }}", "nested too deeply"),
    "deep blocks": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, ""),
    "half a character": ("{{ '\\ud83d' }}", "surrogates not allowed"),
    "a template that is no text": ("\ud83d", "surrogates not allowed"),
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Waits a second at most."""
    monkeypatch.setattr(jinja_process, "SECONDS", 1.0)


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_one_line_with_the_file(bomb):
    source, words = BOMBS[bomb]
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        inline_template(source).render([user("q")], add_generation_prompt=True)
    line = str(error.value)
    assert line.startswith("chat_template.jinja: ") and words in line and "\n" not in line
    assert len(line) < 300 and time.monotonic() - began < 20


def test_a_text_of_many_millions_of_characters_is_refused(monkeypatch):
    monkeypatch.setattr(jinja_process, "SECONDS", 10.0)
    with pytest.raises(UserError, match="writes more than 16,777,216 characters"):
        inline_template("{{ 'x' * (2 ** 25) }}").render([user("q")], add_generation_prompt=True)


def test_the_next_template_is_rendered_all_the_same():
    with pytest.raises(UserError):
        inline_template(LOOP).render([user("q")], add_generation_prompt=True)
    plain = inline_template("{{ messages[0].content }}")
    assert plain.render([user("né 🙂")], add_generation_prompt=True) == "né 🙂"


def test_a_conversation_with_half_a_character_or_deep_inside_is_one_line():
    plain = inline_template("{{ messages[0].content }}")
    with pytest.raises(UserError, match="surrogates not allowed"):
        plain.render([user("\ud83d")], add_generation_prompt=True)
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UserError, match="the conversation is nested too deeply"):
        plain.render([user(deep)], add_generation_prompt=True)


def test_the_process_ends_with_its_master():
    """Whether that ends by itself or is killed."""
    code = (
        "import sys; from data.jinja_process import JINJA;"
        "JINJA.ask(('render', '{{ 1 }}', {})); print(JINJA._process.pid, flush=True);"
        "sys.stdin.read()"
    )
    for kill in (False, True):
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as master:
            assert master.stdout is not None and master.stdin is not None
            worker = Path("/proc") / master.stdout.readline().strip()
            assert not worker.parent.exists() or worker.exists()
            if kill:
                master.kill()
            else:
                master.stdin.close()
        for _ in range(100):
            if not worker.exists():
                break
            time.sleep(0.05)
        assert not worker.exists()
