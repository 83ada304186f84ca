"""From a config to batches, as one grain dataset whose cursor can be saved.

A document goes through these steps, each in the file of its name:

    sources -> documents (split) -> shuffle, mix -> encoding (tokens, FIM, copies, chat)
    -> bad_records (skipped, counted) -> packing (rows) -> stream (batches) -> prefetch
"""

import math

import grain

from data.bad_records import RecordEncoder
from data.config import DataConfig
from data.documents import ReadableDocuments, Split, uniform_hash
from data.encoding import ConversationEncoder, DocumentEncoder
from data.packing import fit_rows, split_rows
from data.pair_encoding import PairEncoder
from data.sources import has_pairs, open_split
from data.stream import Batches
from data.tokenizer import Tokenizer
from errors import UserError


def batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    split: Split,
    seed: int,
    chat: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    repeat: bool = True,
) -> Batches:
    """Makes the batches of this process: dicts of arrays [batch_size / process_count, seq_len].

    data/packing.py describes their arrays. Every epoch of a source is shuffled anew. The iterator's
    `get_state` is plain JSON, and `set_state` resumes with exactly the batches that would have
    come. Processes share no document.

    Args:
      config: the sources and how they become rows.
      tokenizer: encodes the documents.
      split: the split to take documents from.
      seed: decides the order of the documents and every random choice in them.
      chat: makes batches for fine-tuning. Whole conversations are packed ("fit"), attention never
        crosses them, one that is longer than a row is cut at the row's end, and only what the
        assistant writes has weight. Of sources of pairs both conversations of a pair are in one
        row, uncut (data/pair_encoding.py).
      process_index: index of this process among those that share the global batch.
      process_count: number of those processes.
      repeat: goes on without an end. Otherwise the batches are one epoch (of the source that ends
        first, if there are several), the last of them filled up with rows of padding.

    Raises:
      UserError: the batch does not divide by the processes, a source is wrong, or a source has
        fewer documents than there are processes. The iterator raises it at a record that cannot be
        read or encoded, unless data.bad_records = "skip".
    """
    if config.batch_size % process_count:
        raise UserError(
            f"data.batch_size = {config.batch_size}: must be divisible by the {process_count} "
            "processes"
        )
    pairs = holds_pairs(config)
    if pairs and not chat:
        raise UserError(
            f"data.sources = {config.sources}: pairs, which launch.finetune learns from; to learn "
            "from one conversation of each, name its field alone"
        )
    rows = config.batch_size // process_count
    mixed, patience = _mixed_documents(
        config, split, seed, chat, process_index, process_count, repeat
    )
    encoder = PairEncoder if pairs else ConversationEncoder if chat else DocumentEncoder
    # Each process draws its own numbers, since the same index is another document in each. No
    # threads here: they would only wait for each other, since encoding is Python. The prefetch
    # thread at the end keeps the training loop from waiting.
    encoded = mixed.random_map(
        RecordEncoder(encoder(config, tokenizer), skips=config.skips_bad_records),
        seed=_derive_seed(seed, f"write/{process_index}"),
    ).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))

    def rows_of(sequences: grain.IterDataset) -> grain.IterDataset:
        if chat or config.packing == "fit":
            pack_seed = _derive_seed(seed, "pack")
            return fit_rows(sequences, config.seq_len, rows, pack_seed, weighted=chat)
        return split_rows(sequences, config.seq_len)

    return Batches(
        encoded,
        rows_of,
        batch_rows=rows,
        patience=patience,
        pad=tokenizer.pad,
        cross_document_attention=config.cross_document_attention and not chat,
        pairs=pairs,
    )


def holds_pairs(config: DataConfig) -> bool:
    """Returns whether the sources hold pairs. Raises UserError if only some of them do."""
    found = {spec: has_pairs(spec) for spec in config.sources}
    if any(found.values()) and not all(found.values()):
        other = next(spec for spec in found if not found[spec])
        raise UserError(
            f'data.sources: "{other}" has no pairs, and another source has; a run learns from one '
            "or the other"
        )
    return any(found.values())


def _mixed_documents(
    config: DataConfig,
    split: Split,
    seed: int,
    chat: bool,
    process_index: int,
    process_count: int,
    repeat: bool,
) -> tuple[grain.MapDataset, int]:
    """Makes the (kind of source, document) pairs of this process, shuffled and mixed.

    Returns:
      (the dataset, the number of its first elements among which each document is at least once).
    """
    datasets, elements = [], 0
    for number, spec in enumerate(config.sources):
        documents = open_split(config, spec, split, chat=chat)
        if len(documents) < process_count:
            raise UserError(
                f'data.sources: "{spec}" has {len(documents)} documents for {split}, fewer than '
                f"the {process_count} processes"
            )
        readable = ReadableDocuments(documents, skips=config.skips_bad_records)
        shard = grain.MapDataset.source(readable)[process_index::process_count]
        shuffled = shard.shuffle(seed=_derive_seed(seed, f"shuffle/{number}"))
        pairs = shuffled.map(lambda document, kind=documents.source.kind: (kind, document))
        datasets.append(pairs.repeat() if repeat else pairs)
        share = config.mixture[number] / sum(config.mixture)
        elements = max(elements, math.ceil(len(shard) / share) + len(config.sources))
    if len(datasets) == 1:
        return datasets[0], elements
    return grain.MapDataset.mix(datasets, weights=config.mixture), elements


def _derive_seed(seed: int, purpose: str) -> int:
    """Returns an independent seed for each purpose, below 2**32 as grain wants it."""
    return int(uniform_hash(f"{seed}/{purpose}") * 2**32)
