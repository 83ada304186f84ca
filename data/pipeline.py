"""From a config to batches, as one grain dataset whose cursor can be saved.

A document goes through these steps, each in the file of its name:

    sources -> documents (split) -> shuffle, mix -> encoding (tokens, FIM, copies, chat)
    -> packing (rows, batches) -> prefetch
"""

from collections.abc import Sequence

import grain

from data.config import DataConfig
from data.documents import Split, uniform_hash
from data.encoding import ConversationEncoder, DocumentEncoder
from data.packing import fit_rows, split_rows, to_batch
from data.prefetch import Prefetch
from data.sources import open_split
from data.tokenizer import Tokenizer
from errors import UserError

PREFETCH_BATCHES = 4


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
) -> grain.IterDataset:
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
        assistant writes has weight.
      process_index: index of this process among those that share the global batch.
      process_count: number of those processes.
      repeat: goes on without an end. Otherwise the batches are one epoch (of the source that ends
        first, if there are several), the last of them filled up with rows of padding.

    Raises:
      UserError: the batch does not divide by the processes, a source is wrong, or a source has
        fewer documents than there are processes.
    """
    if config.batch_size % process_count:
        raise UserError(
            f"data.batch_size = {config.batch_size}: must be divisible by the {process_count} "
            "processes"
        )
    rows = config.batch_size // process_count
    mixed = _mixed_documents(config, split, seed, chat, process_index, process_count, repeat)
    encode = ConversationEncoder(config, tokenizer) if chat else DocumentEncoder(config, tokenizer)
    # Each process draws its own numbers, since the same index is another document in each. No
    # threads here: they would only wait for each other, since encoding is Python. The prefetch
    # thread at the end keeps the training loop from waiting.
    encoded = mixed.random_map(
        encode, seed=_derive_seed(seed, f"write/{process_index}")
    ).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    sequences = grain.experimental.FlatMapIterDataset(encoded, _Flatten())
    if chat or config.packing == "fit":
        pack_seed = _derive_seed(seed, "pack")
        packed = fit_rows(sequences, config.seq_len, rows, pack_seed, weighted=chat)
    else:
        packed = split_rows(sequences, config.seq_len)
    crossing = config.cross_document_attention and not chat
    stacked = packed.batch(
        rows, batch_fn=lambda values: grain.experimental.batch_and_pad(values, batch_size=rows)
    )
    ready = stacked.map(
        lambda packed: to_batch(packed, tokenizer.pad, cross_document_attention=crossing)
    )
    return Prefetch(ready, PREFETCH_BATCHES)


def _mixed_documents(
    config: DataConfig,
    split: Split,
    seed: int,
    chat: bool,
    process_index: int,
    process_count: int,
    repeat: bool,
) -> grain.MapDataset:
    """Makes the (kind of source, document) pairs of this process, shuffled and mixed."""
    datasets = []
    for number, spec in enumerate(config.sources):
        documents = open_split(config, spec, split, chat=chat)
        if len(documents) < process_count:
            raise UserError(
                f'data.sources: "{spec}" has {len(documents)} documents for {split}, fewer than '
                f"the {process_count} processes"
            )
        shard = grain.MapDataset.source(documents)[process_index::process_count]
        shuffled = shard.shuffle(seed=_derive_seed(seed, f"shuffle/{number}"))
        pairs = shuffled.map(lambda document, kind=documents.source.kind: (kind, document))
        datasets.append(pairs.repeat() if repeat else pairs)
    if len(datasets) == 1:
        return datasets[0]
    return grain.MapDataset.mix(datasets, weights=config.mixture)


class _Flatten(grain.experimental.FlatMapTransform):
    """Gives the sequences of each document one by one."""

    max_fan_out = 1  # an IterDataset ignores it

    def flat_map(self, element: list) -> Sequence:
        return element


def _derive_seed(seed: int, purpose: str) -> int:
    """Returns an independent seed for each purpose, below 2**32 as grain wants it."""
    return int(uniform_hash(f"{seed}/{purpose}") * 2**32)
