"""The sections `data` and `tokenizer` of a config refuse what makes no sense."""

import math

import pytest

from data.config import DataConfig, TokenizerConfig
from errors import UserError


@pytest.mark.parametrize("section", [TokenizerConfig, DataConfig])
def test_defaults_are_valid(section):
    section()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"fim_rate": 1.3}, "data.fim_rate = 1.3: must be between 0 and 1"),
        ({"validation": 1.0}, "data.validation = 1.0: must be at least 0 and below 1"),
        (
            {"mixture": (1.0, 2.0)},
            "data.mixture = (1.0, 2.0): must have one share for each of the 1",
        ),
        ({"mixture": (0.0,)}, "every share must be above 0"),
        ({"sources": ()}, "data.sources = (): must name at least one"),
        ({"packing": "tight"}, "data.packing = 'tight': must be one of split, fit"),
        ({"fim_sources": ("txt",)}, "data.fim_sources = ('txt',): must each be one of stdlib"),
        ({"chat_template": "chatml"}, "data.chat_template = 'chatml'"),
        ({"batch_size": 0}, "data.batch_size = 0"),
        ({"fim_level": "file"}, "must be one of context_or_plain, context, document"),
        ({"bad_records": "drop"}, "data.bad_records = 'drop': must be one of stop, skip"),
        ({"seq_len": 10**12}, "data.seq_len = 1000000000000: must be at most 16,777,216"),
        ({"batch_size": 10**12}, "data.batch_size = 1000000000000: must be at most 33,554,432"),
        ({"seq_len": 2**24, "batch_size": 200}, "data.batch_size = 200: must be at most 128"),
        ({"mixture": (math.inf,)}, "at most 1,000,000 times the smallest"),
        ({"mixture": (math.nan,)}, "every share must be above 0"),
        (
            {"sources": ("stdlib", "stdlib"), "mixture": (1.0, 1e-300)},
            "the largest share must be at most 1,000,000 times the smallest",
        ),
        ({"incomplete_turns": "skip"}, "data.incomplete_turns = 'skip': must be one of stop, mask"),
        (
            {"chat_template": "checkpoint", "chat_template_options": "enable_thinking=False"},
            "data.chat_template_options = 'enable_thinking=False': must be a JSON object",
        ),
        (
            {"chat_template_options": '{"thinking": true}'},
            'are those of data.chat_template = "checkpoint", not of "think"',
        ),
    ],
)
def test_a_wrong_value_names_its_field(config, change, words):
    with pytest.raises(UserError) as error:
        config(**change)
    assert words in str(error.value)


def test_a_wrong_tokenizer_names_its_field():
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size = 100: must be at least 268"):
        TokenizerConfig(kind="bpe", path="", vocab_size=100)
    with pytest.raises(UserError, match=r"vocab_size = 10000000000: must be at most 1,048,576"):
        TokenizerConfig(vocab_size=10**10)
    with pytest.raises(UserError, match=r"tokenizer\.path"):
        TokenizerConfig(kind="file", path="", vocab_size=0)
