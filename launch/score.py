"""What a model makes of given tokens or texts: logits, hidden states, expert choices, selected
keys, greedy continuations; log-probabilities and perplexity.

    python -m launch.score --model=hf:DIR --tokens=rows.json --out=scores.npz --greedy=16 --hidden
    --routes --mtp --exact python -m launch.score --model=runs/quickstart/sparse
    --text="notes/*.txt" --out=texts.npz

rows.json is {"input_ids": [[...], ...]}; rows may differ in length. With rows B, the longest of T
tokens, V ids, L layers, scores.npz holds

    logits [B, T, V] float32 of the next token; 0 behind the end of a shorter row, as everywhere
    below (choices: -1) lengths [B]         tokens of each row greedy [B, N]       the N likeliest
    tokens one after the other, each read again; an end-of-text token does not stop them hidden [B,
    L, T, D] each layer's output, the last one's before the final norm routes [B, L, T, K] the
    experts of each token, best first, -1 in layers without; indexer [B, L, T, k] the keys each
    query selected, in order, then -1 mtp_logits [B, T, V] of the token after the next, by the first
    MTP module (mtp_logits_2 by the second, ...); 0 where there is no next token to read

With --text: files [F], counts [F] tokens predicted, logprobs (of all files, one after the other, in
nats) and ids.
"""

import dataclasses
import functools
import glob
import json
import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from checkpoints.locations import hf_directory, run_directory
from data.tokenizer import Tokenizer
from data.tokenizer_files import load_tokenizer
from errors import UserError
from experiment.command_line import Flag, command
from experiment.schema import Config
from experiment.setup import compile_cache, with_vocab_size
from model.config import ModelConfig
from model.decode import decode_weights, jitted_step, prefill
from model.heads import logits_of, token_logprobs
from model.record import recorded_forward
from model.segments import same_segment
from model.sharding import batch_sharding, batch_shards, make_mesh, replicated
from model.transformer import Transformer
from rl.rollout import pad_prompts
from train.restore import load_variables
from train.setup import to_host

ROWS = 8  # at a time, on each share of the batch


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
):
    if bool(tokens) == bool(text):
        raise UserError("give one of --tokens and --text")
    if not out and tokens:
        raise UserError("--out is missing: name the .npz to write")
    if exact:
        jax.config.update("jax_default_matmul_precision", "highest")
    compile_cache()
    scorer = Scorer(config, model, exact)
    if text:
        found = score_texts(scorer, files_of(text), window)
    else:
        rows = read_rows(Path(tokens), scorer.model.vocab_size)
        found = scorer.rows(rows, hidden=hidden, routes=routes, mtp=mtp) | (
            {"greedy": scorer.greedy(rows, greedy)} if greedy else {}
        )
    if out and jax.process_index() == 0:
        write_arrays(Path(out), found)
        print(
            f"{out}: " + ", ".join(f"{name} {list(array.shape)}" for name, array in found.items())
        )


class Scorer:
    """A model on its mesh, and what it is asked."""

    def __init__(self, config: Config, origin: str, exact: bool):
        self.origin, self.mesh = origin, make_mesh(config.mesh)
        model = (
            config.model
            if config.model.vocab_size
            else with_vocab_size(config.model, self.tokenizer)
        )
        self.model: ModelConfig = dataclasses.replace(model, dtype="float32") if exact else model
        self.stage = (
            "sparse" if model.indexer.n_heads and config.sampling.attention == "sparse" else "dense"
        )
        self.at_once = ROWS * batch_shards(self.mesh)
        with jax.set_mesh(self.mesh):
            self.variables = load_variables(self.model, self.mesh, origin)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(
            (hf_directory(self.origin) or run_directory(self.origin)) / "tokenizer.json"
        )

    def rows(
        self, rows: list[list[int]], *, hidden: bool, routes: bool, mtp: bool
    ) -> dict[str, np.ndarray]:
        """Logits and what else is wanted, of rows of ids."""
        forward = jax.jit(
            functools.partial(self._forward, hidden=hidden, routes=routes, mtp=mtp),
            out_shardings=replicated(self.mesh),
        )
        longest = max(map(len, rows))
        parts = [
            self._asked(forward, rows[first : first + self.at_once], longest)
            for first in range(0, len(rows), self.at_once)
        ]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return found | {"lengths": np.asarray([len(row) for row in rows], np.int32)}

    def _forward(
        self,
        variables: dict,
        tokens_BT: Array,
        segments_BT: Array,
        *,
        hidden: bool,
        routes: bool,
        mtp: bool,
    ) -> dict[str, Array]:
        positions_BT = jnp.maximum(jnp.cumsum(segments_BT, axis=-1) - 1, 0)
        inputs = tokens_BT, positions_BT, segments_BT
        if hidden or routes:
            output, record = recorded_forward(self.model, variables, *inputs, self.stage)
        else:
            output = Transformer(self.model).apply(variables, *inputs, stage=self.stage, mtp=mtp)
        real_BT = segments_BT > 0
        head = functools.partial(logits_of, self.model, variables["params"])
        found = {"logits": jnp.where(real_BT[..., None], head(output.hidden_BTD), 0.0)}
        if hidden:
            found["hidden"] = jnp.where(real_BT[:, None, :, None], record.hidden_BLTD, 0.0).astype(
                jnp.float32
            )
        if routes:
            choices = {"routes": record.routes_BLTK, "indexer": record.selected_BLTk}
            found |= {
                name: jnp.where(real_BT[:, None, :, None], each, -1)
                for name, each in choices.items()
                if each.shape[-1]
            }
        for depth, hidden_BTD in enumerate(output.mtp_hidden if mtp else (), start=1):
            name = "mtp_logits" if depth == 1 else f"mtp_logits_{depth}"
            found[name] = jnp.where(
                same_segment(segments_BT, depth)[..., None], head(hidden_BTD), 0.0
            )
        return found

    def _asked(self, ask, rows: list[list[int]], width: int) -> dict[str, np.ndarray]:
        """What a jitted function says of some rows, padded on the right to `width` and with empty
        rows until they divide over the mesh.
        """
        shards = batch_shards(self.mesh)
        tokens_BT, segments_BT = np.zeros((2, -(-len(rows) // shards) * shards, width), np.int32)
        for number, row in enumerate(rows):
            tokens_BT[number, : len(row)], segments_BT[number, : len(row)] = row, 1
        with jax.set_mesh(self.mesh):
            sharding = batch_sharding(self.mesh)
            found = ask(
                self.variables,
                jax.device_put(tokens_BT, sharding),
                jax.device_put(segments_BT, sharding),
            )
        return {name: to_host(array)[: len(rows)] for name, array in found.items()}

    def greedy(self, rows: list[list[int]], count: int) -> np.ndarray:
        """The `count` likeliest tokens after each row [B, count], one after the other."""
        width = max(map(len, rows))
        weights_fn = jax.jit(functools.partial(decode_weights, self.model, rows=self.at_once))
        read = jax.jit(
            functools.partial(prefill, self.model, slots=width + count, stage=self.stage)
        )
        step = jitted_step(self.model, self.stage)
        found = []
        with jax.set_mesh(self.mesh):
            weights, sharding, shards = (
                weights_fn(self.variables),
                batch_sharding(self.mesh),
                batch_shards(self.mesh),
            )
            for first in range(0, len(rows), self.at_once):
                some = rows[first : first + self.at_once]
                prompts = pad_prompts(some + [some[-1]] * (-len(some) % shards), width, 0)
                cache, logits_BV = read(
                    self.variables,
                    jax.device_put(prompts.tokens_PT, sharding),
                    jax.device_put(prompts.segments_PT, sharding),
                )
                tokens = [jnp.argmax(logits_BV, axis=-1)]
                for _ in range(count - 1):
                    cache, logits_BV = step(weights, tokens[-1], cache)
                    tokens.append(jnp.argmax(logits_BV, axis=-1))
                found.append(to_host(jnp.stack(tokens, axis=1))[: len(some)])
        return np.concatenate(found).astype(np.int32)

    def logprobs(self, rows: list[list[int]]) -> list[np.ndarray]:
        """Of each row, the log-probability of every token but its first, in nats. Few shapes are
        compiled: powers of two, up to the longest row.
        """
        longest, found = max(map(len, rows), default=0), []
        for first in range(0, len(rows), self.at_once):
            some = rows[first : first + self.at_once]
            width = min(longest, 1 << (max(map(len, some)) - 1).bit_length())
            padding = min(
                self.at_once,
                batch_shards(self.mesh)
                << (-(-len(some) // batch_shards(self.mesh)) - 1).bit_length(),
            ) - len(some)
            logprobs_BT = self._asked(self._logprobs, some + [[0]] * padding, width)["logprobs"]
            found += [logprobs_BT[number, : len(row) - 1] for number, row in enumerate(some)]
        return found

    @functools.cached_property
    def _logprobs(self) -> Callable:
        def ask(variables: dict, tokens_BT: Array, segments_BT: Array) -> dict[str, Array]:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
            output = Transformer(self.model).apply(
                variables, tokens_BT, positions_BT, segments_BT, stage=self.stage, mtp=False
            )
            targets_BT = jnp.roll(tokens_BT, -1, axis=1)
            return {
                "logprobs": token_logprobs(
                    self.model, variables["params"], output.hidden_BTD, targets_BT
                )[0]
            }

        return jax.jit(ask, out_shardings=replicated(self.mesh))


def score_texts(scorer: Scorer, files: list[Path], window: int) -> dict[str, np.ndarray]:
    """Log-probabilities of whole files, in windows of `window` tokens that begin with the last
    token of the one before (the first with bos, if there is one): each token is predicted once,
    from at most window - 1 before it. Prints a line a file.
    """
    tokenizer = scorer.tokenizer
    if window < 2:
        raise UserError(f"--window={window}: must be at least 2")
    logprobs, counts, ids = [], [], []
    print(f"{'nats/token':>10} {'perplexity':>10} {'bits/byte':>10} {'tokens':>10}  file")
    for file in files:
        try:
            written = file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as failure:
            raise UserError(f"{file}: cannot read as text: {failure}") from failure
        row = ([] if tokenizer.bos is None else [tokenizer.bos]) + tokenizer.encode(written)
        pieces = [
            row[start : start + window] for start in range(0, max(len(row) - 1, 0), window - 1)
        ]
        found = np.concatenate([np.zeros(0, np.float32), *scorer.logprobs(pieces)])
        logprobs.append(found)
        counts.append(len(found))
        ids += row[1:]
        if len(found):
            mean, size = -found.mean(dtype=np.float64), max(len(written.encode()), 1)
            print(
                f"{mean:10.4f} {math.exp(min(mean, 700)):10.3f} {mean * len(found) / math.log(2) / size:10.4f} {len(found):10,}  {file}",
                flush=True,
            )
    total = np.concatenate([np.zeros(0, np.float32), *logprobs])
    if len(files) > 1 and len(total):
        mean = -total.mean(dtype=np.float64)
        print(f"{mean:10.4f} {math.exp(min(mean, 700)):10.3f} {'':>10} {len(total):10,}  all")
    return {
        "files": np.asarray(list(map(str, files))),
        "counts": np.asarray(counts),
        "logprobs": total,
        "ids": np.asarray(ids, np.int32),
    }


def files_of(patterns: tuple[str, ...]) -> list[Path]:
    found = []
    for pattern in patterns:
        matches = sorted(
            Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()
        )
        if not matches:
            raise UserError(f"--text={pattern}: no such file")
        found += matches
    return found


def read_rows(path: Path, vocab: int) -> list[list[int]]:
    """The rows of {"input_ids": [[...], ...]}. Raises UserError for anything else, and for an id
    the model does not have.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    rows = content.get("input_ids") if isinstance(content, dict) else None
    if (
        not isinstance(rows, list)
        or not rows
        or not all(
            isinstance(row, list) and all(type(token) is int for token in row) for row in rows
        )
    ):
        raise UserError(
            f'{path}: must be {{"input_ids": [[...], ...]}}, with at least one row of whole numbers'
        )
    for number, row in enumerate(rows):
        if not row:
            raise UserError(f"{path}: row {number} is empty")
        wrong = next((token for token in row if not 0 <= token < vocab), None)
        if wrong is not None:
            raise UserError(
                f"{path}: row {number} has token {wrong}; the model has 0 to {vocab - 1}"
            )
    return rows


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz that is there whole, or not at all."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            np.savez(file, **arrays)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"--out={path}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    command(
        run,
        config="model",
        workdir=False,
        flags={
            "tokens": Flag("", 'a JSON file {"input_ids": [[...], ...]}'),
            "text": Flag((), "text files, by name or pattern"),
            "out": Flag("", "the .npz to write"),
            "greedy": Flag(0, "tokens to go on with after each row"),
            "hidden": Flag(False, "each layer's output too"),
            "routes": Flag(False, "each token's experts and selected keys too"),
            "mtp": Flag(False, "the MTP modules' logits too"),
            "exact": Flag(False, "float32 throughout, matmuls at the highest precision"),
            "window": Flag(2_048, "tokens of context for --text"),
        },
    )
