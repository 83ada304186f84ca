"""What the data room reads: the sections `tokenizer` and `data` of a config, validated once.
Meanings and units stand in configs/base.py.
"""

from dataclasses import dataclass

from data.chat import TEMPLATES
from errors import UserError

TOKENIZER_KINDS = ("bpe", "bytes", "file")
SOURCE_KINDS = ("stdlib", "text", "jsonl", "parquet", "arrayrecord", "task")
PACKINGS = ("split", "fit")


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer. Raises UserError naming the field if a value makes no sense."""

    kind: str
    path: str
    vocab_size: int

    def __post_init__(self):
        _one_of("tokenizer.kind", self.kind, TOKENIZER_KINDS)
        _check(
            self.kind != "file" or self.path != "",
            "tokenizer.path",
            self.path,
            'tokenizer.kind = "file" needs the path of a tokenizer.json',
        )
        _check(
            self.kind == "file" or self.path == "",
            "tokenizer.path",
            self.path,
            'needs tokenizer.kind = "file"; set that too, or leave it empty',
        )
        _check(
            self.kind != "bpe" or self.vocab_size >= 268,
            "tokenizer.vocab_size",
            self.vocab_size,
            "must be at least 268 (256 bytes and 12 special tokens)",
        )


@dataclass(frozen=True)
class DataConfig:
    """Which documents, and how they become rows. Raises UserError naming the field if a value makes
    no sense.
    """

    sources: tuple[str, ...]
    mixture: tuple[float, ...]
    validation: float
    seq_len: int
    batch_size: int
    fim_rate: float
    fim_spm: float
    fim_sources: tuple[str, ...]
    copy_rate: float
    packing: str
    cross_document_attention: bool
    chat_template: str

    def __post_init__(self):
        _check(len(self.sources) > 0, "data.sources", self.sources, "must name at least one source")
        _check(
            len(self.mixture) == len(self.sources),
            "data.mixture",
            self.mixture,
            f"must have one share for each of the {len(self.sources)} data.sources",
        )
        _check(
            all(share > 0 for share in self.mixture),
            "data.mixture",
            self.mixture,
            "every share must be above 0 (to leave a source out, remove it)",
        )
        _check(
            0 <= self.validation < 1,
            "data.validation",
            self.validation,
            "must be at least 0 and below 1",
        )
        _check(self.seq_len >= 8, "data.seq_len", self.seq_len, "must be at least 8 tokens")
        _check(self.batch_size >= 1, "data.batch_size", self.batch_size, "must be at least 1 row")
        _check(0 <= self.fim_rate <= 1, "data.fim_rate", self.fim_rate, "must be between 0 and 1")
        _check(0 <= self.fim_spm <= 1, "data.fim_spm", self.fim_spm, "must be between 0 and 1")
        _check(
            0 <= self.copy_rate <= 1, "data.copy_rate", self.copy_rate, "must be between 0 and 1"
        )
        for kind in self.fim_sources:
            _one_of("data.fim_sources", kind, SOURCE_KINDS)
        _one_of("data.packing", self.packing, PACKINGS)
        _one_of("data.chat_template", self.chat_template, tuple(TEMPLATES))

    @property
    def infills_spm(self) -> bool:
        """The order in which a model trained on this data is asked to infill: the one it saw more
        of.
        """
        return self.fim_spm > 0.5


def _check(right: bool, field: str, value: object, rule: str) -> None:
    if not right:
        raise UserError(f"{field} = {value!r}: {rule}")


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    _check(
        value in allowed,
        field,
        value,
        "must be one of " + ", ".join(f'"{name}"' for name in allowed),
    )
