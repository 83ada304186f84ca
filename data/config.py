"""The sections `tokenizer` and `data` of a config.

Each field is written once, here, with its default and meaning.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from data.chat import TEMPLATES
from errors import FieldChecks

TOKENIZER_KINDS = ("bpe", "bytes", "file")
SOURCE_KINDS = ("stdlib", "text", "jsonl", "parquet", "arrayrecord", "task")
PACKINGS = ("split", "fit")
FIM_LEVELS = ("context_or_plain", "context", "document")
BAD_RECORDS = ("stop", "skip")
INCOMPLETE_TURNS = ("stop", "mask")

# Bounds far beyond use, so that a slip of the pen is an error and not a full memory.
MAX_VOCAB_SIZE = 2**20
MAX_SEQ_LEN = 2**24
MAX_BATCH_TOKENS = 2**31  # of all rows of a step
MAX_MIXTURE_RATIO = 10**6


@dataclass(frozen=True)
class TokenizerConfig:
    """Chooses the tokenizer that a run trains or reads."""

    # "bpe": byte-level BPE trained on data.sources | "bytes" | "file": a Hugging Face tokenizer
    kind: str = "bpe"
    path: str = ""  # kind "file": where tokenizer.json is
    vocab_size: int = 512  # kind "bpe": entries, special tokens included

    def __post_init__(self):
        check = FieldChecks(self, "tokenizer")
        check.one_of("kind", TOKENIZER_KINDS)
        if self.kind == "file":
            needs = 'tokenizer.kind = "file" needs the path of a tokenizer.json'
            check.that(self.path != "", "path", needs)
        else:
            needs = 'needs tokenizer.kind = "file"; set that too, or leave it empty'
            check.that(self.path == "", "path", needs)
        if self.kind == "bpe":
            least = "must be at least 268 (256 bytes and 12 special tokens)"
            check.that(self.vocab_size >= 268, "vocab_size", least)
            check.at_most(MAX_VOCAB_SIZE, "vocab_size")


@dataclass(frozen=True)
class DataConfig:
    """Chooses the documents that a run reads, and how they become rows of tokens."""

    # One string a source: "stdlib" | "text:GLOB" | "jsonl:GLOB#FIELD" (.gz, .zst, .bz2, .xz too) |
    # "parquet:GLOB#FIELD" | "arrayrecord:GLOB#FIELD" (records are JSON, or text without #FIELD) |
    # "task:NAME?min_ops=2&max_ops=4" (verifiable problems of data/tasks: the task's own parameters,
    # and count=20000, style=text|chat, direct=0.0). For chat, FIELD holds the list of messages; a
    # field "tools" beside it goes to the checkpoint's template. "CHOSEN,REJECTED" for FIELD makes
    # pairs, for the losses of finetune.loss (docs/preferences.md).
    sources: tuple[str, ...] = ("stdlib",)
    mixture: tuple[float, ...] = (1.0,)  # share of documents drawn from each source
    # Share of files (or records) held out, by hash. A task always holds out a tenth of itself.
    validation: float = 0.05
    # A record that cannot be read or encoded: "stop", the run ends there, and what it learnt is
    # saved | "skip": metrics.jsonl counts them as bad_records, and the first few are shown.
    bad_records: str = "stop"
    seq_len: int = 256  # T, tokens of a row
    batch_size: int = 8  # B, rows of a step, over all processes
    # Share of documents made into fill-in-the-middle before packing. What metrics.jsonl calls
    # fim_share is the share of a batch's tokens that are infilled, of those of fim_sources.
    fim_rate: float = 0.5
    # What is infilled (arXiv 2207.14255). "context": each of the pieces of at most a
    # row that a document is cut into | "context_or_plain": the same, but a piece that its sentinels
    # make longer than a row stays plain | "document": all of it (of a long file, a chunk of 16
    # bytes a token), which is then cut at the ends of rows, so that a row may lack a part.
    fim_level: str = "context_or_plain"
    # Of those, the share written suffix-prefix-middle; the rest is prefix-suffix-middle. Above a
    # half, evaluation and sampling infill in that order too.
    fim_spm: float = 0.5
    # Kinds of source that FIM applies to (no task: its answer must stay last).
    fim_sources: tuple[str, ...] = ("stdlib", "text", "jsonl", "parquet", "arrayrecord")
    # Share of documents written as copying exercises (data/copies.py) in place of anything else;
    # launch.finetune has none.
    copy_rate: float = 0.0
    packing: str = (
        "split"  # "split": concatenate, then cut | "fit": first fit, documents stay whole
    )
    # Attention crosses documents packed in one row, as DeepSeek-V3 pretrains. Chat never does.
    cross_document_attention: bool = True
    # How chat is written: "think" | "r1" (data/chat.py) | "checkpoint": the tokenizer's own jinja.
    chat_template: str = "think"
    # Switches of that jinja, a JSON object: '{"enable_thinking": false}'.
    chat_template_options: str = ""
    # A turn of which the template leaves something out (a thought, a call of a tool): "stop", an
    # error | "mask": launch.finetune gives it weight 0, and counts it; launch.pretrain stops.
    incomplete_turns: str = "stop"

    def __post_init__(self):
        check = FieldChecks(self, "data")
        sources = len(self.sources)
        check.that(sources > 0, "sources", "must name at least one source")
        shares = f"must have one share for each of the {sources} data.sources"
        check.that(len(self.mixture) == sources, "mixture", shares)
        positive = "every share must be above 0 (to leave a source out, remove it)"
        check.that(all(share > 0 for share in self.mixture), "mixture", positive)
        least = max(self.mixture) / MAX_MIXTURE_RATIO
        apart = f"the largest share must be at most {MAX_MIXTURE_RATIO:,} times the smallest"
        check.that(all(least <= share < math.inf for share in self.mixture), "mixture", apart)
        check.that(0 <= self.validation < 1, "validation", "must be at least 0 and below 1")
        check.that(self.seq_len >= 8, "seq_len", "must be at least 8 tokens")
        check.at_most(MAX_SEQ_LEN, "seq_len")
        check.that(self.batch_size >= 1, "batch_size", "must be at least 1 row")
        check.at_most(MAX_BATCH_TOKENS // self.seq_len, "batch_size")
        for name in ("fim_rate", "fim_spm", "copy_rate"):
            check.that(0 <= getattr(self, name) <= 1, name, "must be between 0 and 1")
        known = all(kind in SOURCE_KINDS for kind in self.fim_sources)
        check.that(known, "fim_sources", f"must each be one of {', '.join(SOURCE_KINDS)}")
        check.one_of("fim_level", FIM_LEVELS)
        check.one_of("bad_records", BAD_RECORDS)
        check.one_of("packing", PACKINGS)
        check.one_of("chat_template", tuple(TEMPLATES))
        check.one_of("incomplete_turns", INCOMPLETE_TURNS)
        options = self.template_options
        form = """must be a JSON object, such as '{"enable_thinking": false}'"""
        check.that(options is not None, "chat_template_options", form)
        own = not options or self.chat_template == "checkpoint"
        whose = f'are those of data.chat_template = "checkpoint", not of "{self.chat_template}"'
        check.that(own, "chat_template_options", whose)

    @property
    def template_options(self) -> dict[str, Any] | None:
        """The switches of the chat template by name, or None if they are no JSON object."""
        try:
            options = json.loads(self.chat_template_options or "{}")
        except (ValueError, RecursionError):
            return None
        return options if isinstance(options, dict) else None

    @property
    def skips_bad_records(self) -> bool:
        """True if a record that cannot be read or encoded does not end the run."""
        return self.bad_records == "skip"

    @property
    def infills_spm(self) -> bool:
        """True if infilling puts the suffix first, as most of the training documents then do."""
        return self.fim_spm > 0.5
