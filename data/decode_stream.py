"""Incremental decoding, for a reader who watches a completion grow."""

from data.tokenizer import Tokenizer


class DecodeStream:
    """Decodes ids one by one and never shows half a UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # The ids shown last, then those not yet shown: some decoders look at the token before.
        self._ids: list[int] = []
        self._num_shown = 0  # of `_ids`

    def push(self, token_id: int) -> str:
        """Takes the next id and returns the text that it completes.

        The text is "" while a character is still open.
        """
        self._ids.append(token_id)
        before, after = self._decode()
        if after.endswith("\ufffd"):
            return ""
        self._ids, self._num_shown = (
            self._ids[self._num_shown :],
            len(self._ids) - self._num_shown,
        )
        return after[len(before) :]

    def flush(self) -> str:
        """Returns the text left at the end; a character that never closed becomes U+FFFD."""
        before, after = self._decode()
        self._ids, self._num_shown = [], 0
        return after[len(before) :]

    def _decode(self) -> tuple[str, str]:
        """Returns the text of the ids shown last, and that of all."""
        shown = self._tokenizer.decode(self._ids[: self._num_shown])
        return shown, self._tokenizer.decode(self._ids)
