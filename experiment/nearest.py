"""Which name a person meant who wrote one that does not exist."""

import difflib
from collections.abc import Iterable

LIKE_ENOUGH = 0.6  # of difflib's ratio


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Returns the one of `names` that is most like `name`, None if none is like it.

    Of dotted names the last part counts, and between equals the sections before it. A name may be
    given by the initials of its words: "lr" is "train.learning_rate".
    """
    scored = [(*_likeness(name, other), other) for other in names]
    best = max(scored, default=(0.0, 0.0, ""))
    return best[2] if best[0] >= LIKE_ENOUGH else None


def _likeness(name: str, other: str) -> tuple[float, float]:
    """Returns how alike the last parts of two names are, and the whole names, each 0 to 1."""
    (*_, ours), (*_, theirs) = name.split("."), other.split(".")
    initials = "".join(word[:1] for word in theirs.split("_"))
    alike = 1.0 if len(ours) > 1 and ours == initials else _ratio(ours, theirs)
    return alike, _ratio(name, other)


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
