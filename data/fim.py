"""Fill-in-the-middle documents.

A document is cut into prefix, middle and suffix, and the middle moves to the end, where a
left-to-right model can learn to write it: Efficient Training of Language Models to Fill in the
Middle (arXiv 2207.14255), in the layout of DeepSeek-V3 (arXiv 2412.19437, section 4.1). The cuts
are between characters, never inside one, and each part is encoded by itself, as it is when a person
asks for an infill.
"""

import numpy as np

from data.tokenizer import Tokenizer


def fim_prompt(prefix: str, suffix: str, tokenizer: Tokenizer, *, spm: bool) -> list[int]:
    """Encodes all that a model reads before it writes the middle (arXiv 2207.14255, section 3).

        PSM    [pre] prefix [suf] suffix [mid]
        SPM    [pre] [suf] suffix [mid] prefix

    SPM is the paper's joint variant: PSM with an empty prefix, and the prefix before the middle.

    Args:
      prefix: text before the middle.
      suffix: text after it.
      tokenizer: encodes both.
      spm: writes SPM rather than PSM.

    Raises:
      UserError: the tokenizer has no fill-in-the-middle sentinels.
    """
    pre, suf, mid = tokenizer.fim
    if spm:
        return [pre, suf, *tokenizer.encode(suffix), mid, *tokenizer.encode(prefix)]
    return [pre, *tokenizer.encode(prefix), suf, *tokenizer.encode(suffix), mid]


def fim_tokens(
    text: str, tokenizer: Tokenizer, rng: np.random.Generator, *, spm: float
) -> list[int]:
    """Encodes a document as fill-in-the-middle: the prompt, then the middle and [eos].

    Args:
      text: the document. Two cuts fall uniformly on its characters, so every part may be empty.
      tokenizer: encodes each part by itself.
      rng: decides the cuts and the order.
      spm: probability of the order suffix-prefix-middle; else it is prefix-suffix-middle.

    Raises:
      UserError: the tokenizer has no fill-in-the-middle sentinels.
    """
    first, second = sorted(rng.integers(0, len(text) + 1, size=2))
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    return [
        *fim_prompt(prefix, suffix, tokenizer, spm=rng.random() < spm),
        *tokenizer.encode(middle),
        tokenizer.eos,
    ]
