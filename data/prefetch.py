"""Batches made ahead of time, so that the training loop never waits for them."""

import atexit
import weakref

import grain


class Prefetch(grain.IterDataset):
    """A dataset whose iterator has a background thread that keeps elements ready.

    The state of the iterator is that of the last element taken, however far ahead the thread is.
    """

    def __init__(self, parent: grain.IterDataset, size: int):
        """Keeps `size` elements of `parent` ready."""
        super().__init__(parent)
        self._size = size

    def __iter__(self) -> grain.DatasetIterator:
        iterator = _PrefetchIterator(self._parent.__iter__(), self._size)
        atexit.register(_close, weakref.ref(iterator))
        return iterator


class _PrefetchIterator(grain.experimental.ThreadPrefetchDatasetIterator):
    """Closes once, and before Python ends.

    grain's own iterator closes when it is collected. That may be in a half-dismantled interpreter,
    which then prints a traceback.
    """

    _is_closed = False

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            super().close()


def _close(reference: weakref.ref) -> None:
    iterator = reference()
    if iterator is not None:
        iterator.close()
