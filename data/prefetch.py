"""Batches made ahead of time, so that the training loop never waits for them."""

import atexit
import weakref

import grain


class Prefetch(grain.IterDataset):
    """A background thread that keeps `size` elements ready. The iterator's state is that of the
    last element taken, however far ahead the thread is.
    """

    def __init__(self, parent: grain.IterDataset, size: int):
        super().__init__(parent)
        self._size = size

    def __iter__(self) -> grain.DatasetIterator:
        iterator = _PrefetchIterator(self._parent.__iter__(), self._size)
        atexit.register(_close, weakref.ref(iterator))
        return iterator


class _PrefetchIterator(grain.experimental.ThreadPrefetchDatasetIterator):
    """Closes once, and before Python ends: grain's own closes when it is collected, which may be in
    a half-dismantled interpreter, and prints a traceback.
    """

    _done = False

    def close(self) -> None:
        if not self._done:
            self._done = True
            super().close()


def _close(reference: weakref.ref) -> None:
    iterator = reference()
    if iterator is not None:
        iterator.close()
