r"""Writes what a model computes for given tokens or texts to an .npz.

    python -m launch.score --model=hf:DIR --tokens=rows.json --out=scores.npz \
        --greedy=16 --hidden --routes --mtp --exact
    python -m launch.score --model=runs/quickstart/sparse --text="notes/*.txt" --out=texts.npz

rows.json is {"input_ids": [[...], ...]}; rows may differ in length. With B rows, the longest of T
tokens, V ids and L layers, scores.npz has

    logits       [B, T, V]     float32, of the next token; 0 behind the end of a shorter row, as
                               everywhere below (choices: -1)
    lengths      [B]           tokens of each row
    greedy       [B, N]        the N likeliest tokens one after the other, each read again; an
                               end-of-text token does not stop them
    hidden       [B, L, T, D]  each layer's output, the last one's before the final norm
    routes       [B, L, T, K]  the experts of each token, best first, -1 in layers without
    indexer      [B, L, T, k]  the keys each query selected, in order, then -1
    mtp_logits   [B, T, V]     of the token after the next, by the first MTP module (mtp_logits_2 by
                               the second, ...); 0 where there is no next token to read

With --text it has files [F], counts [F] of tokens predicted, logprobs (of all files, one after the
other, in nats) and ids.
"""

import dataclasses
import glob
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data.tokenizer import Tokenizer
from errors import UserError
from experiment.command_line import Flag, command
from experiment.open_model import origin_tokenizer
from experiment.schema import Config
from experiment.setup import compile_cache, with_vocab_size
from files import read_json, replacing
from model.sharding import make_mesh
from rl.scoring import Scorer
from train.restore import load_variables

FLAGS = {
    "tokens": Flag("", 'a JSON file {"input_ids": [[...], ...]}'),
    "text": Flag((), "text files, by name or pattern"),
    "out": Flag("", "the .npz to write"),
    "greedy": Flag(0, "tokens to go on with after each row"),
    "hidden": Flag(False, "each layer's output too"),
    "routes": Flag(False, "each token's experts and selected keys too"),
    "mtp": Flag(False, "the MTP modules' logits too"),
    "exact": Flag(False, "float32 throughout, matmuls at the highest precision"),
    "window": Flag(2_048, "tokens of context for --text"),
}


def run(
    config: Config,
    model: str,
    tokens: str,
    text: tuple[str, ...],
    out: str,
    greedy: int,
    hidden: bool,
    routes: bool,
    mtp: bool,
    exact: bool,
    window: int,
) -> None:
    """Scores tokens or texts, and writes the arrays."""
    if bool(tokens) == bool(text):
        raise UserError("give one of --tokens and --text")
    if not out and tokens:
        raise UserError("--out is missing: name the .npz to write")
    if text and window < 2:
        raise UserError(f"--window={window}: must be at least 2")
    if exact:
        jax.config.update("jax_default_matmul_precision", "highest")
    compile_cache()
    scorer = load_scorer(config, model, exact)
    if text:
        arrays = score_texts(scorer, origin_tokenizer(model), text_files(text), window)
    else:
        rows = read_rows(Path(tokens), scorer.model.vocab_size)
        arrays = scorer.outputs(rows, hidden=hidden, routes=routes, mtp=mtp)
        if greedy:
            arrays["greedy"] = scorer.greedy(rows, greedy)
    if out and jax.process_index() == 0:
        write_arrays(Path(out), arrays)
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        print(f"{out}: {shapes}")


def load_scorer(config: Config, origin: str, exact: bool) -> Scorer:
    """Loads a run's or a Hugging Face checkpoint's parameters; `exact` computes in float32."""
    mesh, model = make_mesh(config.mesh), config.model
    if not model.vocab_size:
        model = with_vocab_size(model, origin_tokenizer(origin))
    if exact:
        model = dataclasses.replace(model, dtype="float32")
    selects = model.indexer.n_heads > 0 and config.sampling.attention == "sparse"
    with jax.set_mesh(mesh):
        variables = load_variables(model, mesh, origin)
    return Scorer(model, mesh, variables, stage="sparse" if selects else "dense")


def score_texts(
    scorer: Scorer, tokenizer: Tokenizer, files: list[Path], window: int
) -> dict[str, np.ndarray]:
    """Scores whole files, each after [bos] if there is one, and prints a line a file."""
    logprobs, ids = [np.zeros(0, np.float32)], []
    print(f"{'nats/token':>10} {'perplexity':>10} {'bits/byte':>10} {'tokens':>10}  file")
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as failure:
            raise UserError(f"{file}: cannot read as text: {failure}") from failure
        row = ([] if tokenizer.bos is None else [tokenizer.bos]) + tokenizer.encode(text)
        found = scorer.text_logprobs(row, window)
        logprobs.append(found)
        ids += row[1:]
        print_score(found, str(file), num_bytes=max(len(text.encode()), 1))
    total = np.concatenate(logprobs)
    if len(files) > 1:
        print_score(total, "all")
    return {
        "files": np.asarray(list(map(str, files))),
        "counts": np.asarray([len(found) for found in logprobs[1:]]),
        "logprobs": total,
        "ids": np.asarray(ids, np.int32),
    }


def print_score(logprobs: np.ndarray, name: str, num_bytes: int | None = None) -> None:
    """Prints a line of the table of `score_texts`, unless nothing was predicted."""
    if not len(logprobs):
        return
    mean = -logprobs.mean(dtype=np.float64)
    bits = "" if num_bytes is None else f"{mean * len(logprobs) / math.log(2) / num_bytes:.4f}"
    perplexity = math.exp(min(mean, 700))
    print(f"{mean:10.4f} {perplexity:10.3f} {bits:>10} {len(logprobs):10,}  {name}", flush=True)


def text_files(patterns: tuple[str, ...]) -> list[Path]:
    """Returns the files that each pattern names, sorted. Raises UserError where one names none."""
    found = []
    for pattern in patterns:
        names = sorted(map(Path, glob.glob(pattern, recursive=True)))
        files = [name for name in names if name.is_file()]
        if not files:
            raise UserError(f"--text={pattern}: no such file")
        found += files
    return found


def read_rows(path: Path, vocab_size: int) -> list[list[int]]:
    """Reads the rows of {"input_ids": [[...], ...]}.

    Raises UserError for anything else, and for an id that the model does not have.
    """
    rows = read_json(path).get("input_ids")
    if not isinstance(rows, list) or not rows or not all(map(is_row, rows)):
        raise UserError(
            f'{path}: must be {{"input_ids": [[...], ...]}}, with at least one row of whole numbers'
        )
    for number, row in enumerate(rows):
        if not row:
            raise UserError(f"{path}: row {number} is empty")
        wrong = next((token for token in row if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise UserError(
                f"{path}: row {number} has token {wrong}; the model has 0 to {vocab_size - 1}"
            )
    return rows


def is_row(value: object) -> bool:
    """Returns whether a JSON value is a list of whole numbers."""
    return isinstance(value, list) and all(type(token) is int for token in value)


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Writes an .npz, whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


if __name__ == "__main__":
    command(run, config="model", workdir=False, flags=FLAGS)
