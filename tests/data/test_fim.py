"""Fill-in-the-middle documents: nothing is lost, and the layouts are the paper's."""

import collections

import numpy as np
import pytest

from data.fim import fim_prompt, fim_tokens
from data.tokenizer_training import bytes_tokenizer, train_bpe
from tests.data.reading import recover

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "",
    "x",
    "naïve 你好 🙂👩‍👩‍👧",
    "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>c<|eos|>",
]


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


def test_the_layouts_are_those_of_the_paper():
    """Joint SPM has its sentinels as PSM with an empty prefix (arXiv 2207.14255, section 3)."""
    tokenizer = bytes_tokenizer()
    pre, suf, mid = tokenizer.fim
    assert fim_prompt("ab", "yz", tokenizer, spm=False) == [pre, *b"ab", suf, *b"yz", mid]
    assert fim_prompt("ab", "yz", tokenizer, spm=True) == [pre, suf, *b"yz", mid, *b"ab"]


def test_cuts_are_uniform_over_characters():
    """They fall on every character position of a text whose characters have 1 to 4 bytes."""
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


def test_the_rate_is_the_share_of_spm():
    tokenizer, rng = bytes_tokenizer(), np.random.default_rng(0)
    text = "abcdefgh" * 20  # long, so that a PSM prefix is rarely empty: at most 2 % of the time
    spm = sum(
        ids[1] == tokenizer.fim.suffix
        for ids in (fim_tokens(text, tokenizer, rng, spm=0.25) for _ in range(1000))
    )
    assert 200 < spm < 320  # 250 and up to 15 empty prefixes, within four standard deviations (14)
