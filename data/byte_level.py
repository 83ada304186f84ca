"""The characters by which byte-level BPE writes bytes."""

from collections.abc import Iterator


def bytes_to_unicode() -> Iterator[str]:
    """Yields the character by which byte-level BPE writes each byte 0..255, as GPT-2's does.

    A byte that is printable Latin-1 is written as itself, any other as the next character from
    U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_in = iter(range(0x100, 0x200))
    for value in range(256):
        yield chr(value if value in printable else next(stand_in))
