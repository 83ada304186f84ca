"""Infilling as a measurement: how much a model uses the suffix that it is shown.

It is the loss of the middle of held-out documents, with the suffix shown against without it.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from data.fim import fim_prompt
from data.padding import pad_rows
from data.tokenizer import Tokenizer
from errors import UserError
from model.config import ModelConfig
from model.heads import token_logprobs
from model.segments import shift_left
from model.transformer import Output, Transformer

Batch = dict[str, np.ndarray]
VARIANTS = ("with_suffix", "without_suffix", "empty_suffix")
MIN_WORDS = 8
WORD_END = re.compile(r"(?<=\S)(?=\s)")


def infill_rows(
    texts: Iterable[str], tokenizer: Tokenizer, seq_len: int, count: int, *, spm: bool
) -> dict[str, Batch]:
    """Writes held-out documents in three ways, as batches of `count` rows of `seq_len` tokens.

    A document is cut at two of its word ends, drawn uniformly, into prefix, middle and suffix:
    byte-level BPE joins white space to the word after it, so no token is broken in any variant.
    `VARIANTS` are

        with_suffix      [pre] prefix [suf] suffix [mid] middle
        without_suffix   prefix middle
        empty_suffix     [pre] prefix [suf] [mid] middle

    and with `spm`

        with_suffix      [pre] [suf] suffix [mid] prefix middle
        without_suffix   prefix middle
        empty_suffix     [pre] [suf] [mid] prefix middle

    where "without_suffix" is left to right, as the model reads ordinary text, and "empty_suffix"
    is the format of infilling with the suffix withheld. The tokens of the middle are the same in
    all three, and alone have weight 1.

    Args:
      texts: documents. Those of fewer than `MIN_WORDS` words, or that do not fit in a row in all
        variants, are passed over.
      tokenizer: encodes them; it must have fill-in-the-middle sentinels.
      seq_len: tokens of a row.
      count: number of documents.
      spm: writes suffix, prefix, middle instead of prefix, suffix, middle.

    Raises:
      UserError: fewer than `count` documents are left, or the tokenizer has no sentinels.
    """
    rows = {name: [] for name in VARIANTS}
    num_rows = 0
    rng = np.random.default_rng(0)
    for text in texts:
        parts = _cut_at_words(text, rng)
        if parts is None:
            continue
        prefix, middle, suffix = parts
        target = tokenizer.encode(middle)
        prompts = {
            "with_suffix": fim_prompt(prefix, suffix, tokenizer, spm=spm),
            "without_suffix": tokenizer.encode(prefix),
            "empty_suffix": fim_prompt(prefix, "", tokenizer, spm=spm),
        }
        if max(map(len, prompts.values())) + len(target) > seq_len:
            continue
        for name, prompt in prompts.items():
            rows[name].append((prompt, target))
        num_rows += 1
        if num_rows == count:
            return {name: infill_batch(rows[name], seq_len, tokenizer.pad) for name in VARIANTS}
    raise UserError(
        f"evaluate.infill_documents = {count}: only {num_rows} held-out documents of {MIN_WORDS} "
        f"or more words fit in data.seq_len = {seq_len} tokens"
    )


def _cut_at_words(text: str, rng: np.random.Generator) -> tuple[str, str, str] | None:
    """Returns (prefix, middle, suffix), or None if the text has too few words to cut."""
    ends = [match.start() for match in WORD_END.finditer(text)]
    if len(ends) < MIN_WORDS:
        return None
    first, second = np.sort(rng.choice(ends, 2, replace=False))
    return text[:first], text[first:second], text[second:]


def infill_batch(rows: Sequence[tuple[list[int], list[int]]], seq_len: int, pad: int) -> Batch:
    """Makes a batch [B, seq_len] of (prompt, target) rows, as data/packing.py describes batches.

    Each row is one segment, padded on the right with `pad`; the targets have weight 1.
    """
    tokens_BT, segments_BT = pad_rows([prompt + target for prompt, target in rows], seq_len, pad)
    at_T = np.arange(seq_len, dtype=np.int32)
    prompt_lengths_B1 = np.array([[len(prompt)] for prompt, _ in rows])
    return {
        "tokens": tokens_BT,
        "positions": at_T * segments_BT,
        "segments": segments_BT,
        "weights": ((at_T >= prompt_lengths_B1) & (segments_BT > 0)).astype(np.float32),
    }


def middle_nats(
    config: ModelConfig, stage: str, eos: int, variables: dict, batch: dict[str, Array]
) -> tuple[Array, Array]:
    """Computes the loss of each row's middle, -log p(token) + log(1 - p(eos)) summed over it.

    Where the middle ends is given, so the probability that a model gives to an end does not count
    against it: a model that is trained to infill expects an end after every token of the middle,
    and only there.

    Args:
      config: the model.
      stage: "dense" or "sparse" attention.
      eos: id that ends a document.
      variables: the model's variables.
      batch: a batch of `infill_rows`.

    Returns:
      (nats_B, tokens_B): the sum, and the number of tokens in it.
    """
    inputs = (batch["tokens"], batch["positions"], batch["segments"])
    output = cast(Output, Transformer(config).apply(variables, *inputs, stage=stage, mtp=False))
    targets_BT, weights_BT = shift_left(batch["tokens"], 1), shift_left(batch["weights"], 1)
    logprobs_BT, _ = token_logprobs(config, variables["params"], output.hidden_BTD, targets_BT)
    eos_BT, _ = token_logprobs(
        config, variables["params"], output.hidden_BTD, jnp.full_like(targets_BT, eos)
    )
    log_not_eos_BT = jnp.log1p(-jnp.exp(eos_BT))
    nats_BT = jnp.where(weights_BT > 0, log_not_eos_BT - logprobs_BT, 0.0)
    return jnp.sum(nats_BT, axis=1), jnp.sum(weights_BT, axis=1)


def middle_losses(
    rows: dict[str, Batch],
    nats_fn: Callable[[Batch], tuple[Array, Array]],
    batch_size: int,
    resamples: int,
) -> dict:
    """Computes the loss of the middle in each variant, and what the suffix saves of it.

    Args:
      rows: the batches of `infill_rows`.
      nats_fn: computes `middle_nats` of a batch.
      batch_size: documents in a call of `nats_fn`; it must divide their number.
      resamples: resamples of the documents for the 95 % bootstrap interval of a saving. All
        variants are resampled alike, so that what makes a document hard cancels.

    Returns:
      "middle_loss_VARIANT" for each variant, in nats per token of the middle, and for the two
      without the suffix "suffix_saves_over_VARIANT", {"mean", "low", "high"} in the same unit.
    """
    num_documents = len(rows["with_suffix"]["tokens"])
    # For each variant, [2, documents]: nats and tokens of each document's middle.
    totals = {name: _document_totals(batch, nats_fn, batch_size) for name, batch in rows.items()}

    def loss(name: str, documents: np.ndarray) -> np.ndarray:
        nats, tokens = totals[name][:, documents].sum(axis=-1)
        return nats / tokens

    everything = np.arange(num_documents)
    result: dict = {f"middle_loss_{name}": float(loss(name, everything)) for name in VARIANTS}
    # [resamples, documents]
    resampled = np.random.default_rng(0).integers(0, num_documents, (resamples, num_documents))
    for name in ("without_suffix", "empty_suffix"):
        savings = loss(name, resampled) - loss("with_suffix", resampled)
        low, high = np.quantile(savings, (0.025, 0.975))
        mean = result[f"middle_loss_{name}"] - result["middle_loss_with_suffix"]
        result[f"suffix_saves_over_{name}"] = {"mean": mean, "low": float(low), "high": float(high)}
    return result


def _document_totals(
    batch: Batch, nats_fn: Callable[[Batch], tuple[Array, Array]], batch_size: int
) -> np.ndarray:
    """Computes the nats and tokens of each document's middle, float64 [2, documents]."""
    parts = [
        nats_fn({key: rows_BT[first : first + batch_size] for key, rows_BT in batch.items()})
        for first in range(0, len(batch["tokens"]), batch_size)
    ]
    return np.concatenate(jax.device_get(parts), axis=1, dtype=np.float64)
