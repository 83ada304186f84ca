"""The gaps that a report shows are cut out of their documents whole, the same for each model."""

import pytest

from data.tokenizer_training import bytes_tokenizer
from rl.infill import TRIED, WORDS, find_gaps, infill_prompt

TOKENIZER = bytes_tokenizer()
SHORT = ("short", "only a few words here")
LONG = ("long", "word " * 500)
TEXTS = [
    (f"text{number}", "".join(f"word{number * place}\n " for place in range(30)))
    for number in range(9)
]


@pytest.mark.parametrize("spm", [False, True])
def test_a_gap_is_a_few_words_of_a_text_that_fits(spm):
    texts = [SHORT, LONG, *TEXTS]
    gaps = find_gaps(texts, TOKENIZER, 400, 3, spm=spm)
    assert [gap["document"] for gap in gaps] == ["text0", "text1", "text2"]
    for gap in gaps:
        whole = gap["prefix"] + gap["middle"] + gap["suffix"]
        assert whole == dict(texts)[gap["document"]]
        assert 1 < len(gap["middle"].split()) < WORDS
        assert len(infill_prompt(gap, TOKENIZER, spm=spm)) <= 400
        assert len(gap["prefix"].split()) > WORDS and gap["suffix"].split()
    assert gaps == find_gaps(texts, TOKENIZER, 400, 3, spm=spm)


def test_a_source_in_which_nothing_fits_is_not_read_to_its_end():
    read = []

    def texts():
        while True:
            read.append(1)
            yield LONG

    assert find_gaps(texts(), TOKENIZER, 100, 3, spm=False) == []
    assert len(read) == TRIED
