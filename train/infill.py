"""Can the model use a suffix? The loss of the middle of held-out documents, with the suffix shown against without it."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import Array

from data.fim import fim_prompt
from data.tokenizer import Tokenizer
from errors import UserError

Batch = dict[str, np.ndarray]
VARIANTS = ("with_suffix", "without_suffix", "empty_suffix")


def infill_rows(texts: Sequence[str], tokenizer: Tokenizer, sequence: int, count: int, *, spm: bool) -> dict[str, Batch]:
    """Held-out middles, three ways, as batches [count, sequence] whose weights are 1 on the middle and 0 elsewhere.

    A document is cut at two of its line ends, drawn uniformly, into prefix, middle and suffix. The cuts are before the white space, as byte-level BPE writes a
    line end and the next line's indentation as one token: no token is broken in any of the variants.

        with_suffix      [pre] prefix [suf] suffix [mid] middle    or, with `spm`, [pre] [suf] suffix [mid] prefix middle
        without_suffix   prefix middle                             left to right, as the model reads ordinary text
        empty_suffix     [pre] prefix [suf] [mid] middle           the same format, the suffix withheld; with `spm`, [pre] [suf] [mid] prefix middle

    The middle's tokens are the same in all three. Documents of fewer than 4 lines, or that do not fit in a row, are passed over.
    Raises UserError when fewer than `count` are left.
    """
    rows = {name: [] for name in VARIANTS}
    rng = np.random.default_rng(0)
    for text in texts:
        lines = text.splitlines(keepends=True)
        if len(lines) < 4:
            continue
        first, second = (len("".join(lines[:cut]).rstrip()) for cut in np.sort(rng.choice(np.arange(1, len(lines)), 2, replace=False)))
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        target = tokenizer.encode(middle)
        prompts = (fim_prompt(prefix, suffix, tokenizer, spm=spm), tokenizer.encode(prefix), fim_prompt(prefix, "", tokenizer, spm=spm))
        if not prefix or not target or max(map(len, prompts)) + len(target) > sequence:
            continue
        for name, prompt in zip(VARIANTS, prompts, strict=True):
            rows[name].append((prompt, target))
        if len(rows[VARIANTS[0]]) == count:
            return {name: to_batch(pairs, sequence, tokenizer.pad) for name, pairs in rows.items()}
    found = f"only {len(rows[VARIANTS[0]])} held-out documents of 4 or more lines fit in data.sequence = {sequence} tokens"
    raise UserError(f"evaluate.infill_documents = {count}: {found}")


def to_batch(pairs: list[tuple[list[int], list[int]]], sequence: int, pad: int) -> dict[str, np.ndarray]:
    tokens_BT = np.full((len(pairs), sequence), pad, np.int32)
    segments_BT, weights_BT = np.zeros_like(tokens_BT), np.zeros(tokens_BT.shape, np.float32)
    for row, (prompt, target) in enumerate(pairs):
        end = len(prompt) + len(target)
        tokens_BT[row, :end] = prompt + target
        segments_BT[row, :end] = 1
        weights_BT[row, len(prompt) : end] = 1
    positions_BT = np.broadcast_to(np.arange(sequence, dtype=np.int32), tokens_BT.shape) * segments_BT
    return {"tokens": tokens_BT, "positions": positions_BT, "segments": segments_BT, "weights": weights_BT}


def middle_losses(rows: dict[str, Batch], evaluate: Callable[[Batch], tuple[dict[str, Array], dict[str, Array]]], at_once: int, resamples: int) -> dict:
    """Nats per token of the middle: middle_loss_with_suffix and the others, and what the suffix saves of each, with its interval.

    Args:
      evaluate: maps a batch to (totals, weights) with the term "lm".
      at_once: documents a batch; their number must divide by it.
      resamples: of the batches, for the 95 % bootstrap interval of a saving. All variants are resampled alike, so what makes a document hard cancels.
    """
    totals = {}
    for name, batch in rows.items():
        parts = [evaluate({key: rows_BT[first : first + at_once] for key, rows_BT in batch.items()}) for first in range(0, len(batch["tokens"]), at_once)]
        totals[name] = np.asarray([(total["lm"], weight["lm"]) for total, weight in jax.device_get(parts)], np.float64)
    drawn_RN = np.random.default_rng(0).integers(0, len(totals[VARIANTS[0]]), (resamples, len(totals[VARIANTS[0]])))

    def loss(name, drawn):
        total, weight = np.moveaxis(totals[name][drawn].sum(axis=-2), -1, 0)
        return total / weight

    everything = np.arange(drawn_RN.shape[1])
    result = {f"middle_loss_{name}": float(loss(name, everything)) for name in VARIANTS}
    for name in VARIANTS[1:]:
        low, high = np.quantile(loss(name, drawn_RN) - loss(VARIANTS[0], drawn_RN), (0.025, 0.975))
        mean = result[f"middle_loss_{name}"] - result[f"middle_loss_{VARIANTS[0]}"]
        result[f"suffix_saves_over_{name}"] = {"mean": mean, "low": float(low), "high": float(high)}
    return result
