"""Text of a run on a page or a terminal: as it is, whatever characters it has."""

import html
import re

# What neither HTML nor UTF-8 can have: control characters, and halves of surrogate pairs.
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def plain(text: object) -> str:
    """Returns a text without the characters that no page and no terminal should get."""
    return FORBIDDEN.sub("\ufffd", str(text))


def escape(text: object) -> str:
    """Returns a text that a page shows as it is, between tags and in quoted attributes."""
    return html.escape(plain(text))
