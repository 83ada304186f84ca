"""Fill-in-the-middle: a document is cut into prefix, middle and suffix, and the middle moves to the
end, where a left-to-right model can learn to write it.

Efficient Training of Language Models to Fill in the Middle (arXiv 2207.14255), in the layout of
DeepSeek-V3 (arXiv 2412.19437, section 4.1). The cuts are between characters, never inside one, and
each piece is encoded by itself, as it will be when a person asks for an infill.
"""

import numpy as np

from data.tokenizer import Tokenizer


def fim_prompt(prefix: str, suffix: str, tokenizer: Tokenizer, *, spm: bool) -> list[int]:
    """What a model reads before it writes the middle (arXiv 2207.14255, section 3).

        PSM    [pre] prefix [suf] suffix [mid] SPM    [pre] [suf] suffix [mid] prefix      (the
        joint variant: PSM with an empty prefix, and the prefix before the middle)

    Raises UserError if the tokenizer has no sentinels.
    """
    pre, suf, mid = tokenizer.fim
    if spm:
        return [pre, suf, *tokenizer.encode(suffix), mid, *tokenizer.encode(prefix)]
    return [pre, *tokenizer.encode(prefix), suf, *tokenizer.encode(suffix), mid]


def fim_tokens(
    text: str, tokenizer: Tokenizer, rng: np.random.Generator, *, spm: float
) -> list[int]:
    """A document as fill-in-the-middle ids: the prompt, then the middle and [eos].

    Args:
      text: the document. Two cuts fall uniformly on its characters, so every piece may be empty.
      rng: decides the cuts and the order.
      spm: probability of the order suffix-prefix-middle; else prefix-suffix-middle.
    """
    first, second = sorted(rng.integers(0, len(text) + 1, size=2))
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    return [
        *fim_prompt(prefix, suffix, tokenizer, spm=rng.random() < spm),
        *tokenizer.encode(middle),
        tokenizer.eos,
    ]
