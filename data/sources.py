"""Source strings, as `DataConfig.sources` documents them, opened as sources of documents."""

import difflib

from data.array_records import ArrayRecords
from data.config import SOURCE_KINDS, DataConfig
from data.documents import Source, Split, Subset, select_split
from data.file_set import match_files, stdlib_files
from data.json_lines import JsonLines
from data.parquet import ParquetColumns
from data.record_files import WHOLE, Records
from data.tasks.documents import TaskDocuments
from data.text_files import TextFiles
from errors import UserError

RECORD_FORMATS: dict[str, type[Records]] = {
    records.kind: records for records in (JsonLines, ParquetColumns, ArrayRecords)
}

# A text file with more bytes than this for each token of a row is cut: into chunks of 8 rows at 2
# bytes a token, which is what a vocabulary of 512 gives on code. So a batch mixes many files, and
# one long file does not make several batches all alike.
CHUNK_BYTES_PER_TOKEN = 16


def open_source(spec: str, chunk_bytes: int, *, chat: bool = False) -> Source:
    """Opens one of `data.sources`.

    Args:
      spec: "stdlib", "text:GLOB", "jsonl:GLOB#FIELD", "parquet:GLOB#FIELD",
        "arrayrecord:GLOB[#FIELD]" or "task:NAME?PARAMETERS". Where FIELD is two names with a comma
        between them, a document is a pair.
      chunk_bytes: longer text files are cut into chunks of about this many bytes, at the ends of
        lines; at least 4.
      chat: opens the problems of a task as conversations.

    Raises:
      UserError: the kind is unknown, no file matches, or the files have no document.
    """
    kind, _, rest = spec.partition(":")
    if kind not in SOURCE_KINDS:
        raise _unknown_kind(spec, kind)
    if kind == "stdlib":
        if rest:
            raise UserError(f'data.sources: "{spec}": write just "stdlib", it takes no pattern')
        source = TextFiles(spec, kind, stdlib_files(), chunk_bytes)
    elif kind == "text":
        source = TextFiles(spec, kind, match_files(spec, rest), chunk_bytes)
    elif kind == "task":
        source = TaskDocuments(spec, chat)
    else:
        pattern, fields = rest.partition("#")[0], fields_of(spec)
        if not all(fields) and (fields != WHOLE or kind != "arrayrecord"):
            raise UserError(
                f'data.sources: "{spec}" does not say which field to read; '
                f"write {kind}:{pattern or 'GLOB'}#FIELD, or #CHOSEN,REJECTED for pairs"
            )
        if len(fields) > 2 or len(set(fields)) < len(fields):
            raise UserError(
                f'data.sources: "{spec}" names {len(fields)} fields; write #FIELD, or '
                "#CHOSEN,REJECTED for pairs"
            )
        source = RECORD_FORMATS[kind](spec, match_files(spec, pattern), fields)
    if len(source) == 0:
        raise UserError(f'data.sources: "{spec}" matches only empty files')
    return source


def fields_of(spec: str) -> tuple[str, ...]:
    """Returns the fields that a source string of records names; ("",) if it names none."""
    return tuple(spec.partition("#")[2].split(","))


def has_pairs(spec: str) -> bool:
    """Returns whether the documents of a source string are pairs."""
    return spec.partition(":")[0] in RECORD_FORMATS and len(fields_of(spec)) > 1


def open_split(config: DataConfig, spec: str, split: Split, *, chat: bool = False) -> Subset:
    """Opens the documents of one split of one of `config.sources`, cut for the rows of the config.

    Raises:
      UserError: as `open_source` does, or the split has no document.
    """
    source = open_source(spec, CHUNK_BYTES_PER_TOKEN * config.seq_len, chat=chat)
    return select_split(source, split, config.validation)


def _unknown_kind(spec: str, kind: str) -> UserError:
    nearest = difflib.get_close_matches(kind, SOURCE_KINDS, n=1)
    hint = f'did you mean "{nearest[0]}"?' if nearest else f"known are {', '.join(SOURCE_KINDS)}"
    return UserError(f'data.sources: "{spec}" is of no known kind; {hint}')
