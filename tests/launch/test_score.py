"""launch.score against the golden checkpoints, on rows of several lengths, on text; its errors."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from configs import base
from data.tokenizer_training import bytes_tokenizer
from errors import UserError
from experiment.config_files import base_config_from, with_checkpoint_fields
from experiment.schema import Config, parse
from launch import score
from tests.model.golden import GOLDEN, golden
from tests.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.golden

OFF: dict[str, Any] = {
    "tokens": "",
    "text": (),
    "out": "",
    "greedy": 0,
    "hidden": False,
    "routes": False,
    "mtp": False,
    "exact": True,
    "window": 2_048,
}


@pytest.fixture(autouse=True)
def precision():
    """--exact sets it for the process."""
    yield
    jax.config.update("jax_default_matmul_precision", None)


def scored(origin: str, tmp_path, rows=None, overrides=(), **flags: Any) -> dict[str, np.ndarray]:
    if rows is not None:
        (tmp_path / "rows.json").write_text(json.dumps({"input_ids": rows}))
        flags["tokens"] = str(tmp_path / "rows.json")
    flags["out"] = str(tmp_path / "out.npz")
    score.run(config_of(origin, overrides), origin, **OFF | flags)
    return dict(np.load(tmp_path / "out.npz"))


def config_of(origin: str, overrides=()) -> Config:
    return parse(with_checkpoint_fields(base_config_from(origin), overrides))


@pytest.mark.parametrize("case", ["deepseek_v3", "deepseek_v32", "qwen3_next"])
def test_every_array_against_golden_values(case, tmp_path):
    """Over the eight devices of the tests: rows are spread, and padded to as many."""
    expected = golden(case)
    found = scored(
        f"hf:{GOLDEN / case}",
        tmp_path,
        expected["input_ids"].tolist(),
        greedy=10,
        hidden=True,
        routes=True,
        mtp=True,
    )
    for name in ("logits", "hidden"):
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], expected[name], atol=5e-4)
    np.testing.assert_array_equal(found["greedy"], expected["greedy"])
    np.testing.assert_array_equal(np.sort(found["routes"], axis=-1), expected["routes"])
    np.testing.assert_array_equal(found["lengths"], [expected["input_ids"].shape[1]] * 2)
    for name in ("indexer", "mtp_logits"):
        assert (name in found) == (name in expected)
    if "indexer" in expected:
        np.testing.assert_array_equal(found["indexer"], expected["indexer"])
    if "mtp_logits" in expected:
        np.testing.assert_allclose(found["mtp_logits"][:, :-1], expected["mtp_logits"], atol=5e-4)
        assert not found["mtp_logits"][:, -1].any()


def test_a_row_is_scored_as_if_it_were_alone(tmp_path):
    """Ten rows of different lengths, more than are scored at a time on one device. Behind a row's
    end there is nothing.
    """
    case, rng = "deepseek_v32", np.random.default_rng(0)
    rows = [rng.integers(0, 96, size).tolist() for size in (3, 17, 1, 9, 30, 12, 12, 5, 2, 8)]
    one = ("--config.mesh.data=8",)
    batch = scored(f"hf:{GOLDEN / case}", tmp_path, rows, one, greedy=3, routes=True)
    assert batch["logits"].shape == (10, 30, 96) and batch["greedy"].shape == (10, 3)
    for number in (0, 2, 4):
        alone = scored(f"hf:{GOLDEN / case}", tmp_path, [rows[number]], one, greedy=3, routes=True)
        size = len(rows[number])
        np.testing.assert_allclose(batch["logits"][number, :size], alone["logits"][0], atol=1e-4)
        np.testing.assert_array_equal(batch["greedy"][number], alone["greedy"][0])
        np.testing.assert_array_equal(
            batch["indexer"][number, :, :size, : alone["indexer"].shape[-1]], alone["indexer"][0]
        )
        assert not batch["logits"][number, size:].any()
        assert (batch["indexer"][number, :, size:] == -1).all()


def test_text_in_windows(tmp_path, capsys):
    """Every byte is predicted once, whatever the window; in one window the numbers are those of the
    logits. The model is one of bytes.
    """
    directory = write_checkpoint(tmp_path / "bytes")
    tokenizer = bytes_tokenizer()
    tokenizer.save(directory / "tokenizer.json")
    text = "naïve café, " * 9
    ids = tokenizer.encode(text)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "empty.txt").write_text("")
    origin = f"hf:{directory}"
    for window, pattern, files in ((2_048, "a.txt", 1), (16, "*.txt", 2)):
        found = scored(origin, tmp_path, text=(str(tmp_path / pattern),), window=window)
        np.testing.assert_array_equal(found["ids"], ids)
        assert found["counts"].tolist() == [len(ids)] + [0] * (files - 1)
        assert found["logprobs"].shape == (len(ids),)
        if window == 2_048:
            logits = scored(origin, tmp_path, [[tokenizer.bos, *ids]])["logits"]
            logits_TV = logits[0, :-1].astype(np.float64)
            expected = logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
            np.testing.assert_allclose(
                found["logprobs"], expected[np.arange(len(ids)), ids], atol=1e-4
            )
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "a.txt" in printed


WRONG = {
    "no such file": (None, "no such file"),
    "not JSON": ("{", "cannot be read as JSON"),
    "no rows": ('{"input_ids": []}', "must be {"),
    "an empty row": ('{"input_ids": [[1], []]}', "row 1 is empty"),
    "a token too large": ('{"input_ids": [[1, 96]]}', "row 0 has token 96; the model has 0 to 95"),
    "not a number": ('{"input_ids": [[1, "a"]]}', "must be {"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_tokens_are_one_line(what, tmp_path):
    content, words = WRONG[what]
    if content is not None:
        (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UserError) as error:
        scored(f"hf:{GOLDEN / 'qwen3'}", tmp_path, tokens=str(tmp_path / "rows.json"))
    assert words in str(error.value) and not (tmp_path / "out.npz").exists()


def test_missing_and_contradicting_flags_are_errors():
    config = parse(base.get_config())
    with pytest.raises(UserError, match="one of --tokens and --text"):
        score.run(config, "nowhere", **OFF)
    with pytest.raises(UserError, match="--out is missing"):
        score.run(config, "nowhere", **{**OFF, "tokens": "rows.json"})
