"""Computes what a model makes of given tokens, row by row.

A `Scorer` returns logits, hidden states, expert choices, selected keys, greedy continuations and
log-probabilities as numpy arrays. Rows may differ in length; they are scored a few at a time.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from data.padding import pad_rows
from model.config import ModelConfig
from model.heads import logits_of, token_logprobs
from model.record import recorded_forward
from model.segments import same_segment
from model.sharding import batch_sharding, batch_shards, replicated
from model.transformer import Output, Transformer
from rl.config import SamplingConfig
from rl.engine import Engine
from rl.request import Prompt, keys_of

ROWS = 8  # scored at a time, on each shard of the batch

Forward = Callable[[dict, Array, Array], dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model on its mesh.

    Attributes:
      model: its vocabulary is filled in.
      variables: {"params", "router"}, on the mesh.
      stage: "dense" or "sparse" attention.
    """

    model: ModelConfig
    mesh: Mesh
    variables: dict
    stage: str

    def outputs(
        self, rows: list[list[int]], *, hidden: bool, routes: bool, mtp: bool
    ) -> dict[str, np.ndarray]:
        """Returns the logits of B rows of ids, padded to the longest of T, and more on request.

        Behind the end of a shorter row everything is 0, choices are -1.

        Args:
          hidden: whether each layer's output is returned.
          routes: whether each token's experts and selected keys are returned.
          mtp: whether the MTP modules' logits are returned.

        Returns:
          logits [B, T, V] float32, lengths [B]; hidden [B, L, T, D]; routes [B, L, T, K] and
          indexer [B, L, T, k], -1 in layers without; mtp_logits [B, T, V] and mtp_logits_2, ... of
          the deeper modules.
        """
        forward = jax.jit(
            functools.partial(self._forward, hidden=hidden, routes=routes, mtp=mtp),
            out_shardings=replicated(self.mesh),
        )
        longest = max(map(len, rows))
        chunks = [self._apply(forward, chunk, longest) for chunk in self._chunks(rows)]
        arrays = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        return arrays | {"lengths": np.asarray([len(row) for row in rows], np.int32)}

    def greedy(self, rows: list[list[int]], count: int) -> np.ndarray:
        """Returns the `count` likeliest tokens after each row, one after the other, [B, count].

        Each is read again before the next. An end-of-text token does not stop them.
        """
        width = max(map(len, rows))
        sampling = SamplingConfig(
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            max_prompt_tokens=width,
            max_new_tokens=count,
            attention=self.stage,
            attention_top_p=1.0,
        )
        engine = Engine(self.model, self.mesh, sampling, rows=min(len(rows), self._rows_at_once))
        keys_PG2 = keys_of(jax.random.key(0), range(len(rows)), 1)  # greedy: they do not matter
        with engine.loaded(self.variables):
            found = engine.run(
                Prompt(row, keys_G2, count, group=number)
                for number, (row, keys_G2) in enumerate(zip(rows, keys_PG2, strict=True))
            )
            completions = {each.group: each.completion for each in found}
        return np.stack([completions[number] for number in range(len(rows))])

    def logprobs(self, rows: list[list[int]]) -> list[np.ndarray]:
        """Returns the log-probability of every token of each row but its first, in nats.

        Few shapes are compiled: powers of two, up to the longest row.
        """
        longest, shards = max(map(len, rows), default=0), batch_shards(self.mesh)
        logprobs = []
        for chunk in self._chunks(rows):
            width = min(longest, _power_of_two(max(map(len, chunk))))
            count = min(self._rows_at_once, shards * _power_of_two(-(-len(chunk) // shards)))
            filled = chunk + [[0]] * (count - len(chunk))
            logprobs_BT = self._apply(self._logprobs, filled, width)["logprobs"]
            logprobs += [logprobs_BT[number, : len(row) - 1] for number, row in enumerate(chunk)]
        return logprobs

    def text_logprobs(self, ids: list[int], window: int) -> np.ndarray:
        """Returns the log-probability of every token of a text but its first, in nats.

        The text is read in windows of `window` tokens, of which each begins with the last token of
        the one before: a token is predicted once, from at most window - 1 before it.
        """
        starts = range(0, max(len(ids) - 1, 0), window - 1)
        windows = [ids[start : start + window] for start in starts]
        return np.concatenate([np.zeros(0, np.float32), *self.logprobs(windows)])

    @property
    def _rows_at_once(self) -> int:
        return ROWS * batch_shards(self.mesh)

    def _chunks(self, rows: list[list[int]]) -> Iterator[list[list[int]]]:
        for first in range(0, len(rows), self._rows_at_once):
            yield rows[first : first + self._rows_at_once]

    def _on_mesh(self, arrays: tuple[np.ndarray, np.ndarray]) -> tuple[Array, Array]:
        sharding = batch_sharding(self.mesh)
        return jax.device_put(arrays[0], sharding), jax.device_put(arrays[1], sharding)

    def _apply(self, forward: Forward, rows: list[list[int]], width: int) -> dict[str, np.ndarray]:
        """Runs a jitted function on rows padded to `width`, with empty ones until they divide."""
        filled = rows + [[]] * (-len(rows) % batch_shards(self.mesh))
        with jax.set_mesh(self.mesh):
            found = forward(self.variables, *self._on_mesh(pad_rows(filled, width, 0)))
        return {name: np.asarray(array)[: len(rows)] for name, array in found.items()}

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
        """Computes logits [B, T, V], and what else is asked for; padding is 0, or -1 in ids.

        Args:
          variables: {"params", "router"}.
          tokens_BT, segments_BT: rows of one segment each; segment 0 is padding.
          hidden: adds "hidden" [B, L, T, D], float32.
          routes: adds "routes" and "indexer" [B, L, T, K], each where the model has any.
          mtp: adds "mtp_logits", "mtp_logits_2", ..., one for each depth of the MTP modules.
        """
        positions_BT = jnp.maximum(jnp.cumsum(segments_BT, axis=-1) - 1, 0)
        inputs = tokens_BT, positions_BT, segments_BT
        record = None
        if hidden or routes:
            output, record = recorded_forward(self.model, variables, *inputs, self.stage)
        else:
            applied = Transformer(self.model).apply(variables, *inputs, stage=self.stage, mtp=mtp)
            output = cast(Output, applied)
        real_BT = segments_BT > 0
        head = functools.partial(logits_of, self.model, variables["params"])
        found = {"logits": jnp.where(real_BT[..., None], head(output.hidden_BTD), 0.0)}
        if record is not None and hidden:
            hidden_BLTD = jnp.where(real_BT[:, None, :, None], record.hidden_BLTD, 0.0)
            found["hidden"] = hidden_BLTD.astype(jnp.float32)
        if record is not None and routes:
            choices = {"routes": record.routes_BLTK, "indexer": record.selected_BLTk}
            found |= {
                name: jnp.where(real_BT[:, None, :, None], each, -1)
                for name, each in choices.items()
                if each.shape[-1]
            }
        for depth, hidden_BTD in enumerate(output.mtp_hidden if mtp else (), start=1):
            name = "mtp_logits" if depth == 1 else f"mtp_logits_{depth}"
            readable_BT = same_segment(segments_BT, depth)
            found[name] = jnp.where(readable_BT[..., None], head(hidden_BTD), 0.0)
        return found

    @functools.cached_property
    def _logprobs(self) -> Forward:
        def forward(variables: dict, tokens_BT: Array, segments_BT: Array) -> dict[str, Array]:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
            inputs = tokens_BT, positions_BT, segments_BT
            applied = Transformer(self.model).apply(variables, *inputs, stage=self.stage, mtp=False)
            hidden_BTD = cast(Output, applied).hidden_BTD
            targets_BT = jnp.roll(tokens_BT, -1, axis=1)
            logprobs_BT, _ = token_logprobs(self.model, variables["params"], hidden_BTD, targets_BT)
            return {"logprobs": logprobs_BT}

        return jax.jit(forward, out_shardings=replicated(self.mesh))


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
