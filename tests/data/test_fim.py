import collections

import numpy as np
import pytest

from data.fim import fim_prompt, fim_tokens
from data.tokenizer import Tokenizer, bytes_tokenizer, train_bpe

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "",
    "x",
    "naïve 你好 🙂👩‍👩‍👧",
    "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>c<|eos|>",
]


def recover(ids: list[int], tokenizer: Tokenizer) -> str:
    """The document that `fim_tokens` was given; the sentinels must be in order, each once."""
    pre, suf, mid = tokenizer.fim
    assert [index for index in ids if index in (pre, suf, mid, tokenizer.eos)] == [
        pre,
        suf,
        mid,
        tokenizer.eos,
    ]
    assert (ids[0], ids[-1]) == (pre, tokenizer.eos)
    at_suffix, at_middle = ids.index(suf), ids.index(mid)
    # In SPM the part before [suf] is empty and the prefix stands before the middle: the same
    # formula recovers both.
    before, suffix, after = (
        ids[1:at_suffix],
        ids[at_suffix + 1 : at_middle],
        ids[at_middle + 1 : -1],
    )
    return tokenizer.decode(before) + tokenizer.decode(after) + tokenizer.decode(suffix)


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def tokenizer(request):
    return train_bpe(TEXTS * 5, 300) if request.param == "bpe" else bytes_tokenizer()


@pytest.mark.parametrize("spm", [0.0, 1.0])
@pytest.mark.parametrize("text", TEXTS)
def test_every_document_is_recovered(tokenizer, text, spm):
    rng = np.random.default_rng(0)
    for _ in range(30):
        ids = fim_tokens(text, tokenizer, rng, spm=spm)
        assert recover(ids, tokenizer) == text
        count = collections.Counter(ids)
        assert all(count[index] == 1 for index in (*tokenizer.fim, tokenizer.eos))


def test_layouts():
    """arXiv 2207.14255, section 3; the sentinels of the joint SPM variant come as in PSM with an
    empty prefix.
    """
    tokenizer = bytes_tokenizer()
    pre, suf, mid = tokenizer.fim
    assert fim_prompt("ab", "yz", tokenizer, spm=False) == [pre, *b"ab", suf, *b"yz", mid]
    assert fim_prompt("ab", "yz", tokenizer, spm=True) == [pre, suf, *b"yz", mid, *b"ab"]


def test_cuts_are_uniform_over_characters():
    """Both ends of the middle, over every character position of a text whose characters have 1 to 4
    bytes.
    """
    tokenizer, rng = bytes_tokenizer(), np.random.default_rng(0)
    seen = collections.Counter()
    for _ in range(3000):
        ids = fim_tokens("aé你🙂", tokenizer, rng, spm=0.0)
        prefix = tokenizer.decode(ids[1 : ids.index(tokenizer.fim.suffix)])
        assert "\ufffd" not in tokenizer.decode(ids)
        seen[len(prefix)] += 1
    # The first of two uniform cuts on 0..4: P(k) = (2 * (5 - k) - 1) / 25. Three standard
    # deviations of a count out of 3000 are below 82.
    for cut in range(5):
        assert abs(seen[cut] - 3000 * (2 * (5 - cut) - 1) / 25) < 82


def test_spm_share():
    tokenizer, rng = bytes_tokenizer(), np.random.default_rng(0)
    text = "abcdefgh" * 20  # long, so that a PSM prefix is rarely empty: at most 2 % of the time
    spm = sum(
        ids[1] == tokenizer.fim.suffix
        for ids in (fim_tokens(text, tokenizer, rng, spm=0.25) for _ in range(1000))
    )
    assert 200 < spm < 320  # 250 and up to 15 empty prefixes, within four standard deviations (14)
