"""Does the evaluation withhold what it says it withholds, and nothing else?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokenizer_training import bytes_tokenizer, train_bpe
from errors import UserError
from model.heads import logits_of
from model.transformer import Transformer
from tests import tiny
from train.infill import VARIANTS, infill_rows, middle_losses, middle_nats

TOKENIZER = bytes_tokenizer()
TEXTS = [
    "seven words are not enough to infill\n",
    *("".join(f"{document}.{line}\n" for line in range(9)) for document in range(4)),
    "long\n" * 100,
]
SEQUENCE = 64


def parts(batch, row):
    """(prompt ids, middle ids)."""
    real, weighed = batch["segments"][row] > 0, batch["weights"][row] > 0
    return batch["tokens"][row][real & ~weighed].tolist(), batch["tokens"][row][weighed].tolist()


@pytest.mark.parametrize("spm", [False, True])
def test_the_middle_is_the_same_and_the_rest_is_as_said(spm):
    rows = infill_rows(TEXTS, TOKENIZER, SEQUENCE, 3, spm=spm)
    pre, suf, mid = TOKENIZER.fim
    for row in range(3):
        whole = "".join(f"{row}.{line}\n" for line in range(9))
        middle = parts(rows["without_suffix"], row)[1]
        prefix, suffix = (
            TOKENIZER.encode(piece) for piece in whole.split(TOKENIZER.decode(middle))
        )
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
    """Positions from 0 in one segment, zeros in the padding; weights on the middle alone."""
    for batch in infill_rows(TEXTS, TOKENIZER, SEQUENCE, 4, spm=False).values():
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            **dict.fromkeys(("tokens", "positions", "segments"), ((4, SEQUENCE), np.int32)),
            "weights": ((4, SEQUENCE), np.float32),
        }
        lengths = batch["segments"].sum(axis=1)
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(
                batch["positions"][row], [*range(length), *[0] * (SEQUENCE - length)]
            )
            assert (batch["tokens"][row, length:] == TOKENIZER.pad).all()


def test_too_few_documents_is_an_error():
    with pytest.raises(
        UserError,
        match=r"evaluate.infill_documents = 5: only 4 held-out documents of 8 or more words fit in data.seq_len = 64",
    ):
        infill_rows(TEXTS, TOKENIZER, SEQUENCE, 5, spm=False)


def test_middle_losses_are_per_token_of_the_middle():
    """As if the n-th token of a row's middle cost n nats, and 1 more without the suffix: whatever
    the batches, and with no spread in what the suffix saves.
    """
    rows = infill_rows(TEXTS, TOKENIZER, SEQUENCE, 4, spm=False)

    def nats(batch):
        counts = batch["weights"].sum(axis=1)
        return counts * (counts + 1) / 2 + counts * (
            TOKENIZER.fim[1] not in batch["tokens"]
        ), counts

    counts = rows["with_suffix"]["weights"].sum(axis=1)
    mean = (counts * (counts + 1) / 2).sum() / counts.sum()
    for at_once in (1, 2, 4):
        losses = middle_losses(rows, nats, at_once, resamples=50)
        assert (
            losses["middle_loss_with_suffix"]
            == losses["middle_loss_empty_suffix"]
            == pytest.approx(mean)
        )
        assert losses["middle_loss_without_suffix"] == pytest.approx(mean + 1)
        assert losses["suffix_saves_over_without_suffix"] == pytest.approx(
            {"mean": 1, "low": 1, "high": 1}
        )


def test_middle_nats_are_of_the_distribution_without_an_end():
    """Against the logits themselves, with that of [eos] taken out before the softmax."""
    config = tiny.model_config()
    variables = tiny.variables(config)
    batch = {name: jnp.asarray(rows) for name, rows in tiny.batch_of(tiny.LAYOUT).items()}
    batch["weights"] = jnp.zeros_like(batch["weights"]).at[:, 3:7].set(1)
    eos = 5
    assert not (batch["tokens"][:, 3:7] == eos).any()
    nats, counts = jax.jit(functools.partial(middle_nats, config, "sparse", eos))(variables, batch)
    output = Transformer(config).apply(
        variables, batch["tokens"], batch["positions"], batch["segments"], stage="sparse", mtp=False
    )
    logits = np.asarray(logits_of(config, variables["params"], output.hidden_BTD), np.float64)
    logits[..., eos] = -np.inf
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for row, (found, count) in enumerate(zip(nats, counts, strict=True)):
        assert count == 4
        assert float(found) == pytest.approx(
            -sum(logprobs[row, at - 1, batch["tokens"][row, at]] for at in range(3, 7)), rel=1e-5
        )


def test_no_token_is_broken():
    """With a tokenizer that merges line ends and indentation, the parts' tokens are the
    document's.
    """
    text = "".join(f"def f{number}(x):\n    if x:\n        return x\n\n" for number in range(3))
    tokenizer = train_bpe([text] * 20, 300)
    rows = infill_rows([text], tokenizer, 128, 1, spm=False)
    prompt, middle = parts(rows["without_suffix"], 0)
    assert prompt + middle == tokenizer.encode(text)[: len(prompt) + len(middle)]
