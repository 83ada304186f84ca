"""What is recorded of a trajectory beside its tokens, and the bytes that it takes on the host.

| name | what is recorded of a token |
|---|---|
| routes | the experts that it was sent to, when it was read |
| selected | the keys that it attended to, when it was read, in stage "sparse" |
| support | the ids that it was drawn from, when it was sampled |
"""

import dataclasses
from collections.abc import Collection, Sequence

import jax
import numpy as np

from errors import UserError
from kernels.bitmask import keys_on_host, num_words, pack_on_host
from model.config import ModelConfig
from model.record import (
    CHOICES,
    Choices,
    expert_type,
    routing_layers,
    selecting_layers,
)
from rl.coding import CodedSets, largest_code
from rl.config import ReinforceConfig, SamplingConfig
from rl.slots import Sampled

RECORDS = (*CHOICES, "support")
BOUND_BYTES = 4  # of a token's bound in `CodedSets`


@dataclasses.dataclass(frozen=True)
class CodedChoices:
    """What layers chose for T tokens, on the host; None where it is not recorded.

    Attributes:
      routes_TLK: the experts, of `expert_type`; its largest number stands for none.
      selected_TL: the positions attended to; the empty set for a token that was not read.
    """

    routes_TLK: np.ndarray | None
    selected_TL: CodedSets | None

    @classmethod
    def of(cls, choices_T: Choices, start: int, topk: int) -> "CodedChoices":
        """Codes the choices for consecutive tokens, of which the first stands at `start`.

        Args:
          choices_T: arrays of tokens, layers and what each chose.
          topk: how many keys a token may attend to.
        """
        routes_TLK, selected_TLk = choices_T.routes_BTLK, choices_T.selected_BTLk
        bounds_T = start + 1 + np.arange(len(selected_TLk))
        return cls(
            np.asarray(routes_TLK) if routes_TLK.shape[1] else None,
            CodedSets.of_lists(np.asarray(selected_TLk), bounds_T, topk)
            if selected_TLk.shape[1]
            else None,
        )

    @classmethod
    def joined(cls, parts: Sequence["CodedChoices"]) -> "CodedChoices":
        """Returns those for the tokens of one part after the other; at least one part."""
        routes = [part.routes_TLK for part in parts if part.routes_TLK is not None]
        selected = [part.selected_TL for part in parts if part.selected_TL is not None]
        return cls(
            np.concatenate(routes) if routes else None,
            CodedSets.joined(selected) if selected else None,
        )

    def __len__(self) -> int:
        """T, the number of tokens; 0 where nothing is recorded."""
        recorded = self.routes_TLK if self.selected_TL is None else self.selected_TL
        return 0 if recorded is None else len(recorded)

    def resized(self, tokens: int) -> "CodedChoices":
        """Returns those for the first so many tokens, or with more that have none."""
        routes_TLK, selected_TL = self.routes_TLK, self.selected_TL
        if routes_TLK is not None:
            none = np.iinfo(routes_TLK.dtype).max
            more = [(0, max(tokens - len(routes_TLK), 0)), (0, 0), (0, 0)]
            routes_TLK = np.pad(routes_TLK[:tokens], more, constant_values=none)
        if selected_TL is not None:
            selected_TL = selected_TL.between(0, min(tokens, len(selected_TL))).extended(tokens)
        return CodedChoices(routes_TLK, selected_TL)


class Recorder:
    """Codes what the programs of rl/slots.py record.

    Attributes:
      record: the names of what they record, of `RECORDS`.
      on: whether trajectories are to have it.

    Raises UserError for a record that there is not.
    """

    def __init__(self, model: ModelConfig, capacity: int, record: frozenset[str]):
        if unknown := sorted(record - set(RECORDS)):
            raise UserError(f"record = {unknown}: must be of {', '.join(RECORDS)}")
        self.record, self.on = record, True
        self._topk, self._vocab_size = min(model.indexer.topk, capacity), model.vocab_size

    @property
    def choices(self) -> frozenset[str]:
        """Those of them that layers choose."""
        return self.record & frozenset(CHOICES)

    def wanted(self, sampled: Sampled) -> Sampled:
        """Leaves out what no trajectory is to have, so that it need not leave the devices."""
        return sampled if self.on else dataclasses.replace(sampled, choices=None, support=None)

    def code(self, choices: Choices | None, index: tuple, start: int) -> list[CodedChoices]:
        """Codes the choices for some tokens of a row; returns none where there are none.

        Args:
          index: of the tokens.
          start: where the first of them stands.
        """
        return [] if choices is None else [CodedChoices.of(choices.at(index), start, self._topk)]

    def support(self, sampled: Sampled, at: tuple) -> CodedSets | None:
        """Codes the ids that some tokens of a slot were drawn from, where it is recorded."""
        if sampled.support is None:
            return None
        support_TW = np.asarray(sampled.support[at])
        count, (row, ids) = len(support_TW), keys_on_host(support_TW)
        counts_T1 = np.bincount(row, minlength=count)[:, None]
        bounds_T = np.full(count, self._vocab_size)
        restricted = counts_T1[row, 0] < self._vocab_size
        return CodedSets.of_numbers(ids[restricted], counts_T1, bounds_T, self._vocab_size)


def support_words(support_T: CodedSets) -> np.ndarray:
    """Returns the ids that tokens were drawn from as `model.heads.token_logprobs` takes them.

    They are a bitmask [T, W]; none is set where nothing was left out.
    """
    bits_TW = np.zeros((len(support_T), num_words(support_T.width)), np.int32)
    for tokens, row, ids in support_T.numbers():
        rows = tokens.stop - tokens.start
        bits_TW[tokens] = pack_on_host(row, ids, rows, support_T.width)
    return bits_TW


def experts_of(routes_TLK: np.ndarray) -> np.ndarray:
    """Returns recorded experts as `model.record.replay` takes them: int32, -1 for none."""
    none = np.iinfo(routes_TLK.dtype).max
    return np.where(routes_TLK == none, -1, routes_TLK.astype(np.int32))


def token_bytes(
    model: ModelConfig, sampling: SamplingConfig, record: Collection[str]
) -> dict[str, int]:
    """Returns the bytes that each record takes on the host for a token, at most.

    Of sampling.top_k ids as likely as one another there may be more in a support, and more bytes.
    """
    capacity, largest = sampling.max_prompt_tokens + sampling.max_new_tokens, {}
    if "routes" in record:
        each = model.moe.num_experts_per_tok * expert_type(model).itemsize
        largest["routes"] = len(routing_layers(model)) * each
    if "selected" in record:
        each = largest_code(model.indexer.topk, capacity)
        largest["selected"] = BOUND_BYTES + len(selecting_layers(model)) * each
    if "support" in record:
        ids = sampling.top_k or model.vocab_size
        largest["support"] = BOUND_BYTES + largest_code(ids, model.vocab_size)
    return largest


def check_fits(
    model: ModelConfig, sampling: SamplingConfig, record: Collection[str], completions: int
) -> None:
    """Says on standard output what the records of so many completions take, where there are any.

    Raises UserError if it is more than sampling.record_gib.
    """
    each = token_bytes(model, sampling, record)
    if not each:
        return
    capacity = sampling.max_prompt_tokens + sampling.max_new_tokens
    gib = completions * capacity * sum(each.values()) / 2**30
    parts = ", ".join(f"{name} {size:,}" for name, size in each.items())
    size = f"{sum(each.values()):,} B a token on the host ({parts})"
    if gib > sampling.record_gib:
        raise UserError(
            f"sampling.record_gib = {sampling.record_gib}: the records of {completions:,} "
            f"completions of {capacity:,} tokens take up to {gib:.3g} GiB, {size}; raise it, or "
            "record less: reinforce.keep_routing, keep_selection, keep_sampling_mask"
        )
    if jax.process_index() == 0:
        print(f"{'records':<12}at most {size}, {gib:.3g} GiB a step", flush=True)


def records_made(model: ModelConfig, stage: str) -> frozenset[str]:
    """Returns which of "routes" and "selected" the model's layers choose."""
    selects = stage == "sparse" and selecting_layers(model)
    return frozenset(["routes"] * bool(routing_layers(model)) + ["selected"] * bool(selects))


def kept_records(
    made: Collection[str], sampling: SamplingConfig, config: ReinforceConfig
) -> frozenset[str]:
    """Returns which of `RECORDS` the trainer does again as the sampler did."""
    keeps = {"routes": config.keep_routing, "selected": config.keep_selection}
    support = config.keep_sampling_mask and sampling.restricts
    return frozenset([name for name in made if keeps[name]] + ["support"] * support)
