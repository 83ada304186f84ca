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


def infill_rows(texts: Sequence[str], tokenizer: Tokenizer, sequence: int, count: int) -> dict[str, dict[str, np.ndarray]]:
    """Held-out middles, three ways, as batches [count, sequence] whose weights are 1 on the middle and 0 elsewhere.

    A document is cut at line ends into prefix, middle and suffix, about 3/8, 2/8 and 3/8 of its lines, so that no token is broken in any of the variants:

        with_suffix      [pre] prefix [suf] suffix [mid] middle
        without_suffix   prefix middle                            left to right, as the model reads ordinary text
        empty_suffix     [pre] prefix [suf] [mid] middle          the same format, the suffix withheld

    The middle's tokens are the same in all three. Documents of fewer than 8 lines, or that do not fit in a row, are passed over.
    Raises UserError when fewer than `count` are left.
    """
    rows = {name: [] for name in VARIANTS}
    for text in texts:
        lines = text.splitlines(keepends=True)
        if len(lines) < 8:
            continue
        first, second = round(len(lines) * 3 / 8), round(len(lines) * 5 / 8)
        prefix, middle, suffix = ("".join(lines[a:b]) for a, b in ((0, first), (first, second), (second, len(lines))))
        target = tokenizer.encode(middle)
        prompts = (fim_prompt(prefix, suffix, tokenizer, spm=False), tokenizer.encode(prefix), fim_prompt(prefix, "", tokenizer, spm=False))
        if not target or max(map(len, prompts)) + len(target) > sequence:
            continue
        for name, prompt in zip(VARIANTS, prompts, strict=True):
            rows[name].append((prompt, target))
        if len(rows[VARIANTS[0]]) == count:
            return {name: to_batch(pairs, sequence, tokenizer.pad) for name, pairs in rows.items()}
    found = f"only {len(rows[VARIANTS[0]])} held-out documents of 8 or more lines fit in data.sequence = {sequence} tokens"
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


def middle_losses(rows: dict[str, Batch], evaluate: Callable[[Batch], tuple[dict[str, Array], dict[str, Array]]]) -> dict[str, float]:
    """Nats per token of the middle: middle_loss_with_suffix and the others. `evaluate` maps a batch to (totals, weights) with the term "lm"."""
    losses = {}
    for name, batch in rows.items():
        totals, weights = jax.device_get(evaluate(batch))
        losses[f"middle_loss_{name}"] = float(totals["lm"] / weights["lm"])
    return losses
