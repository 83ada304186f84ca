"""The measurement of infilling withholds the suffix alone, and counts the middle alone."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokenizer_training import bytes_tokenizer, train_bpe
from errors import UserError
from model.heads import logits_of
from model.transformer import Output, Transformer
from tests import tiny
from train.infill import VARIANTS, infill_rows, middle_losses, middle_nats

TOKENIZER = bytes_tokenizer()
TEXTS = [
    "seven words are not enough to infill\n",
    *("".join(f"{document}.{line}\n" for line in range(9)) for document in range(4)),
    "long\n" * 100,
]
SEQ_LEN = 64


def parts(batch, row):
    """Returns (ids of the prompt, ids of the middle)."""
    tokens_T = batch["tokens"][row]
    is_token_T, is_target_T = batch["segments"][row] > 0, batch["weights"][row] > 0
    return tokens_T[is_token_T & ~is_target_T].tolist(), tokens_T[is_target_T].tolist()


@pytest.mark.parametrize("spm", [False, True])
def test_the_variants_differ_in_the_prompt_alone(spm):
    rows = infill_rows(TEXTS, TOKENIZER, SEQ_LEN, 3, spm=spm)
    pre, suf, mid = TOKENIZER.fim
    for row in range(3):
        whole = "".join(f"{row}.{line}\n" for line in range(9))
        middle = parts(rows["without_suffix"], row)[1]
        prefix, suffix = (TOKENIZER.encode(part) for part in whole.split(TOKENIZER.decode(middle)))
        assert prefix and suffix[0] == middle[0] == TOKENIZER.encode("\n")[0]
        expected = {
            "with_suffix": [pre, *prefix, suf, *suffix, mid],
            "without_suffix": prefix,
            "empty_suffix": [pre, *prefix, suf, mid],
        }
        if spm:
            expected |= {
                "with_suffix": [pre, suf, *suffix, mid, *prefix],
                "empty_suffix": [pre, suf, mid, *prefix],
            }
        for name in VARIANTS:
            assert parts(rows[name], row) == (expected[name], middle)


def test_rows_are_batches():
    """Positions count from 0 in one segment and are 0 in the padding."""
    for batch in infill_rows(TEXTS, TOKENIZER, SEQ_LEN, 4, spm=False).values():
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            **dict.fromkeys(("tokens", "positions", "segments"), ((4, SEQ_LEN), np.int32)),
            "weights": ((4, SEQ_LEN), np.float32),
        }
        lengths = batch["segments"].sum(axis=1)
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(
                batch["positions"][row], [*range(length), *[0] * (SEQ_LEN - length)]
            )
            assert (batch["tokens"][row, length:] == TOKENIZER.pad).all()


def test_too_few_documents_are_an_error():
    with pytest.raises(
        UserError,
        match=r"evaluate.infill_documents = 5: only 4 held-out documents of 8 or more words fit in "
        r"data.seq_len = 64",
    ):
        infill_rows(TEXTS, TOKENIZER, SEQ_LEN, 5, spm=False)


def test_middle_losses_are_per_token_of_the_middle():
    """The n-th token of a row's middle costs n nats, and 1 more without the suffix.

    Then the losses do not depend on the batches, and what the suffix saves has no spread.
    """
    rows = infill_rows(TEXTS, TOKENIZER, SEQ_LEN, 4, spm=False)

    def nats(batch):
        counts = batch["weights"].sum(axis=1)
        extra = counts * (TOKENIZER.fim.suffix not in batch["tokens"])
        return counts * (counts + 1) / 2 + extra, counts

    counts = rows["with_suffix"]["weights"].sum(axis=1)
    mean = (counts * (counts + 1) / 2).sum() / counts.sum()
    for batch_size in (1, 2, 4):
        losses = middle_losses(rows, nats, batch_size, resamples=50)
        assert losses["middle_loss_with_suffix"] == pytest.approx(mean)
        assert losses["middle_loss_empty_suffix"] == losses["middle_loss_with_suffix"]
        assert losses["middle_loss_without_suffix"] == pytest.approx(mean + 1)
        assert losses["suffix_saves_over_without_suffix"] == pytest.approx(
            {"mean": 1, "low": 1, "high": 1}
        )


@pytest.mark.heavy
def test_middle_nats_are_of_the_distribution_without_an_end():
    """They equal those of the logits with that of [eos] taken out before the softmax."""
    config = tiny.model_config()
    variables = tiny.variables(config)
    batch = {name: jnp.asarray(rows) for name, rows in tiny.batch_of(tiny.LAYOUT).items()}
    batch["weights"] = jnp.zeros_like(batch["weights"]).at[:, 3:7].set(1)
    eos = 5
    assert not (batch["tokens"][:, 3:7] == eos).any()
    nats, counts = jax.jit(functools.partial(middle_nats, config, "sparse", eos))(variables, batch)

    @jax.jit
    def all_logits(variables, batch):
        inputs = (batch["tokens"], batch["positions"], batch["segments"])
        applied = Transformer(config).apply(variables, *inputs, stage="sparse", mtp=False)
        return logits_of(config, variables["params"], cast(Output, applied).hidden_BTD)

    logits = np.array(all_logits(variables, batch), np.float64)
    logits[..., eos] = -np.inf
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for row, (found, count) in enumerate(zip(nats, counts, strict=True)):
        assert count == 4
        assert float(found) == pytest.approx(
            -sum(logprobs[row, at - 1, batch["tokens"][row, at]] for at in range(3, 7)), rel=1e-5
        )


def test_no_token_is_broken():
    """The parts have the document's tokens, though this tokenizer merges line ends and indents."""
    text = "".join(f"def f{number}(x):\n    if x:\n        return x\n\n" for number in range(3))
    tokenizer = train_bpe([text] * 20, 300)
    rows = infill_rows([text], tokenizer, 128, 1, spm=False)
    prompt, middle = parts(rows["without_suffix"], 0)
    assert prompt + middle == tokenizer.encode(text)[: len(prompt) + len(middle)]
