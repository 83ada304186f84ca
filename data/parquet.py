"""Columns of Parquet files as documents, with random access in little memory."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet

from data.cache import cached
from data.documents import BadRecord
from data.file_set import FileSet, locate
from data.pairs import PROMPT
from data.record_files import Records
from data.records import missing_field, without_nulls
from data.waiting import Waiting
from errors import UserError

# Bytes of a block of rows, about: a record is read with its whole block.
BLOCK_BYTES = 2**16

BLOCKS, ROWS = "blocks.arrow", "rows.npy"

READ_ROWS = 256  # at a time
READ_BYTES = 2**20  # of a column at a time


class ParquetColumns(Records):
    """Columns of Parquet files, and "tools" beside conversations, "prompt" beside pairs.

    A row group has no random access, and may be as large as its file. So the columns are written
    once, row group by row group, as a file of small blocks in the cache (Arrow's format of files,
    compressed by LZ4), unless they are small themselves and stay in memory.
    """

    kind = "parquet"

    def __init__(self, spec: str, files: FileSet, fields: tuple[str, ...]):
        self._blocks: list[_Blocks] = []
        super().__init__(spec, files, fields)

    def _open_file(self, path: Path) -> int:
        """Makes the blocks of the columns that are needed, and returns the number of rows."""
        with path.open("rb") as opened:
            parquet, schema = _open(path, opened, self._fields)
            blocks = None
            if _decoded_bytes(parquet) <= self._memory_left:
                batches = _small_batches(path, parquet, schema)
                blocks = _blocks_in_memory(batches, self._memory_left)
            if blocks is None:
                batches = _small_batches(path, parquet, schema)
                form = f"blocks 1 {schema.names}"
                blocks = _blocks_in(cached(path, form, lambda to: _write(batches, schema, to)))
        self._memory_left -= blocks.bytes_in_memory
        self._blocks.append(blocks)
        return len(blocks)

    def _read_record(self, file: int, record: int, where: str) -> dict[str, object]:
        try:
            return self._blocks[file][record]
        except (ValueError, OverflowError, RecursionError) as error:  # UTF-8, dates, ...
            raise BadRecord(f"{where}: cannot be read ({error})") from error


class _Blocks:
    """Rows by index."""

    def __init__(
        self, rows: Sequence[int], block: Callable[[int], pyarrow.RecordBatch], bytes_in_memory: int
    ):
        """Takes the numbers of rows of the blocks, and what returns a block."""
        self._cumulative_rows, self._block = np.cumsum(rows), block
        self.bytes_in_memory = bytes_in_memory

    def __len__(self) -> int:
        return int(self._cumulative_rows[-1]) if len(self._cumulative_rows) else 0

    def __getitem__(self, index: int) -> dict[str, object]:
        """Returns the values of a row by name. Raises what Arrow raises for what is no value."""
        number, row = locate(self._cumulative_rows, index)
        block = self._block(number)
        names = block.schema.names
        return {name: without_nulls(block.column(name)[row].as_py()) for name in names}


def _blocks_in_memory(batches: Iterator[pyarrow.RecordBatch], most_bytes: int) -> _Blocks | None:
    """Returns the batches as blocks, or None if they have more bytes than `most_bytes`."""
    kept, size = [], 0
    for batch in batches:
        kept.append(batch)
        size += batch.nbytes
        if size > most_bytes:
            return None
    return _Blocks([batch.num_rows for batch in kept], kept.__getitem__, size)


def _write(batches: Iterator[pyarrow.RecordBatch], schema: pyarrow.Schema, to: Path) -> None:
    """Writes a directory that `_blocks_in` reads."""
    to.mkdir()
    rows = []
    options = pyarrow.ipc.IpcWriteOptions(compression="lz4")
    with pyarrow.ipc.new_file(str(to / BLOCKS), schema, options=options) as file:
        for batch in batches:
            file.write_batch(batch)
            rows.append(batch.num_rows)
    np.save(to / ROWS, np.array(rows, np.int64))


def _blocks_in(directory: Path) -> _Blocks:
    return _Blocks(
        np.load(directory / ROWS),
        lambda number: _open_blocks(directory / BLOCKS).get_batch(number),
        bytes_in_memory=0,
    )


@functools.lru_cache(maxsize=128)  # a process may have some 1,000 files open
def _open_blocks(path: Path) -> pyarrow.ipc.RecordBatchFileReader:
    options = pyarrow.ipc.IpcReadOptions(use_threads=False)  # a block is small
    return pyarrow.ipc.open_file(pyarrow.OSFile(str(path)), options=options)


def _decoded_bytes(parquet: pyarrow.parquet.ParquetFile) -> int:
    """Returns the bytes of a file's columns, as it states them; there may be more."""
    metadata = parquet.metadata
    return sum(
        metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)
    )


def _open(
    path: Path, opened: BinaryIO, fields: tuple[str, ...]
) -> tuple[pyarrow.parquet.ParquetFile, pyarrow.Schema]:
    """Opens a file, and returns the schema of those of its columns that are needed.

    Raises:
      UserError: it is no Parquet file, or it lacks a column of `fields`, or has two.
    """
    try:
        parquet = pyarrow.parquet.ParquetFile(
            opened,
            pre_buffer=False,  # a row group may be the whole file
            buffer_size=READ_BYTES,
            page_checksum_verification=True,
        )
        schema = parquet.schema_arrow
    except Exception as error:  # Arrow raises many kinds for damaged files
        raise UserError(f"{path}: not a Parquet file ({error})") from error
    for field in fields:
        if field not in schema.names:
            raise UserError(f"{path}: {missing_field(field, schema.names)}")
    columns = [*fields, *([PROMPT] if len(fields) > 1 and PROMPT in schema.names else [])]
    kinds = [schema.types[schema.names.index(name)] for name in columns]
    if any(map(pyarrow.types.is_nested, kinds)) and "tools" in schema.names:
        columns.append("tools")
    columns = list(dict.fromkeys(columns))
    for name in columns:
        if schema.names.count(name) > 1:
            raise UserError(f'{path}: has {schema.names.count(name)} columns "{name}"; rename one')
    return parquet, pyarrow.schema([(name, plain(schema.field(name).type)) for name in columns])


def plain(kind: pyarrow.DataType) -> pyarrow.DataType:
    """Returns a type without dictionaries, of which a file of blocks has one for all blocks."""
    if pyarrow.types.is_dictionary(kind):
        return kind.value_type
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([field.with_type(plain(field.type)) for field in kind.fields])
    if pyarrow.types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(plain(kind.value_type)))
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(plain(kind.value_type)))
    return kind


def _small_batches(
    path: Path, parquet: pyarrow.parquet.ParquetFile, schema: pyarrow.Schema
) -> Iterator[pyarrow.RecordBatch]:
    """Yields the columns of `schema` in batches of about `BLOCK_BYTES`.

    Raises UserError where the file is damaged.
    """
    waiting, done = Waiting(f"reading {path}"), 0
    batches = parquet.iter_batches(batch_size=READ_ROWS, columns=schema.names)
    while True:
        try:
            batch = next(batches, None)
            batch = batch and batch.select(schema.names).cast(schema)
        except Exception as error:  # Arrow raises many kinds for damaged files
            place = f"after row {done:,}" if done else "in the first rows"
            raise UserError(
                f"{path}: damaged {place} ({error}); replace the file, or leave it out of "
                "data.sources"
            ) from error
        if batch is None:
            return
        rows = max(1, batch.num_rows * BLOCK_BYTES // max(batch.nbytes, 1))
        for start in range(0, batch.num_rows, rows):
            yield batch.slice(start, rows)
        done += batch.num_rows
        waiting.update(done, "rows", parquet.metadata.num_rows)
