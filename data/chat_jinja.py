"""The Jinja sandbox in which a checkpoint's chat template runs.

It has the filters, functions and extensions that Hugging Face's `apply_chat_template` gives to
templates, so that a template renders exactly the same text here.
"""

import datetime
import functools
import json
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


@functools.cache
def jinja_environment() -> ImmutableSandboxedEnvironment:
    """Returns the sandbox; all templates share it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """Returns a template ready to run. Raises jinja2.TemplateSyntaxError if it is none."""
    return jinja_environment().from_string(source)


class _Generation(Extension):
    """The block {% generation %}, by which a template marks what the assistant writes.

    The mark is not used here, so the block only opens a scope.
    """

    tags = {"generation"}  # noqa: RUF012 jinja's own declaration

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Writes JSON as it is; Jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(reason: str) -> None:
    raise jinja2.TemplateError(reason)
