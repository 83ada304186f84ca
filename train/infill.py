"""Can the model use a suffix? The loss of the middle of held-out documents, with the suffix shown
against without it.
"""

import re
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from data.fim import fim_prompt
from data.tokenizer import Tokenizer
from errors import UserError
from model.config import ModelConfig
from model.heads import token_logprobs
from model.segments import shift_left
from model.transformer import Transformer

Batch = dict[str, np.ndarray]
VARIANTS = ("with_suffix", "without_suffix", "empty_suffix")
WORD_END = re.compile(r"(?<=\S)(?=\s)")


def infill_rows(
    texts: Iterable[str], tokenizer: Tokenizer, sequence: int, count: int, *, spm: bool
) -> dict[str, Batch]:
    """Held-out middles, three ways, as batches [count, sequence] whose weights are 1 on the middle
    and 0 elsewhere.

    A document is cut at two of its word ends, drawn uniformly, into prefix, middle and suffix:
    byte-level BPE joins white space to the word after it, so no token is broken in any of the
    variants.

        with_suffix      [pre] prefix [suf] suffix [mid] middle    or, with `spm`, [pre] [suf]
        suffix [mid] prefix middle without_suffix   prefix middle                             left
        to right, as the model reads ordinary text empty_suffix     [pre] prefix [suf] [mid] middle
        the same format, the suffix withheld; with `spm`, [pre] [suf] [mid] prefix middle

    The middle's tokens are the same in all three. Documents of fewer than 8 words, or that do not
    fit in a row, are passed over. Raises UserError when fewer than `count` are left.
    """
    rows = {name: [] for name in VARIANTS}
    rng = np.random.default_rng(0)
    for text in texts:
        ends = [found.start() for found in WORD_END.finditer(text)]
        if len(ends) < 8:
            continue
        first, second = np.sort(rng.choice(ends, 2, replace=False))
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        target = tokenizer.encode(middle)
        prompts = (
            fim_prompt(prefix, suffix, tokenizer, spm=spm),
            tokenizer.encode(prefix),
            fim_prompt(prefix, "", tokenizer, spm=spm),
        )
        if max(map(len, prompts)) + len(target) > sequence:
            continue
        for name, prompt in zip(VARIANTS, prompts, strict=True):
            rows[name].append((prompt, target))
        if len(rows[VARIANTS[0]]) == count:
            return {name: to_batch(pairs, sequence, tokenizer.pad) for name, pairs in rows.items()}
    found = f"only {len(rows[VARIANTS[0]])} held-out documents of 8 or more words fit in data.seq_len = {sequence} tokens"
    raise UserError(f"evaluate.infill_documents = {count}: {found}")


def to_batch(
    pairs: list[tuple[list[int], list[int]]], sequence: int, pad: int
) -> dict[str, np.ndarray]:
    tokens_BT = np.full((len(pairs), sequence), pad, np.int32)
    segments_BT, weights_BT = np.zeros_like(tokens_BT), np.zeros(tokens_BT.shape, np.float32)
    for row, (prompt, target) in enumerate(pairs):
        end = len(prompt) + len(target)
        tokens_BT[row, :end] = prompt + target
        segments_BT[row, :end] = 1
        weights_BT[row, len(prompt) : end] = 1
    positions_BT = (
        np.broadcast_to(np.arange(sequence, dtype=np.int32), tokens_BT.shape) * segments_BT
    )
    return {
        "tokens": tokens_BT,
        "positions": positions_BT,
        "segments": segments_BT,
        "weights": weights_BT,
    }


def middle_nats(
    config: ModelConfig, stage: str, eos: int, variables: dict, batch: dict[str, Array]
) -> tuple[Array, Array]:
    """(nats, tokens) of each row's middle, [B]: -log p(token) + log(1 - p(eos)).

    Where the middle ends is given, so what a model puts on ending is not held against it: a model
    that was taught to infill expects an end after every token of the middle, and only there.
    """
    output = Transformer(config).apply(
        variables, batch["tokens"], batch["positions"], batch["segments"], stage=stage, mtp=False
    )
    targets_BT, weights_BT = shift_left(batch["tokens"], 1), shift_left(batch["weights"], 1)
    logprobs_BT, _ = token_logprobs(config, variables["params"], output.hidden_BTD, targets_BT)
    eos_BT, _ = token_logprobs(
        config, variables["params"], output.hidden_BTD, jnp.full_like(targets_BT, eos)
    )
    goes_on_BT = jnp.log1p(-jnp.exp(eos_BT))
    return jnp.sum(jnp.where(weights_BT > 0, goes_on_BT - logprobs_BT, 0.0), axis=1), jnp.sum(
        weights_BT, axis=1
    )


def middle_losses(
    rows: dict[str, Batch],
    nats: Callable[[Batch], tuple[Array, Array]],
    at_once: int,
    resamples: int,
) -> dict:
    """Nats per token of the middle: middle_loss_with_suffix and the others, and what the suffix
    saves of each, with its interval.

    Args:
      nats: `middle_nats` of a batch.
      at_once: documents a batch; their number must divide by it.
      resamples: of the documents, for the 95 % bootstrap interval of a saving. All variants are
        resampled alike, so what makes a document hard cancels.
    """
    count = len(rows[VARIANTS[0]]["tokens"])
    found = {}
    for name, batch in rows.items():
        parts = [
            nats({key: rows_BT[first : first + at_once] for key, rows_BT in batch.items()})
            for first in range(0, count, at_once)
        ]
        found[name] = np.concatenate(jax.device_get(parts), axis=1, dtype=np.float64)

    def loss(name, documents):
        nats, tokens = found[name][:, documents].sum(axis=-1)
        return nats / tokens

    drawn_RN = np.random.default_rng(0).integers(0, count, (resamples, count))
    result = {f"middle_loss_{name}": float(loss(name, np.arange(count))) for name in VARIANTS}
    for name in VARIANTS[1:]:
        low, high = np.quantile(loss(name, drawn_RN) - loss(VARIANTS[0], drawn_RN), (0.025, 0.975))
        mean = result[f"middle_loss_{name}"] - result[f"middle_loss_{VARIANTS[0]}"]
        result[f"suffix_saves_over_{name}"] = {"mean": mean, "low": float(low), "high": float(high)}
    return result
