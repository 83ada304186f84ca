"""Recorded cases of other libraries (tests/golden/algorithms) as specs of the table.

Each library has a file with a function case -> `Ours`, or a text that says why not.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden" / "algorithms"
Case = dict[str, Any]

# What an input calls it -> what `tests.rl.losses.batch_of` and `paid_of` do.
NAMES = {
    "mask": "mask",
    "logprobs": "logprobs",
    "old_logprobs": "old",
    "sampler_logprobs": "sampler",
    "reference_logprobs": "reference",
    "entropies": "entropy",
    "advantages": "advantages",
    "groups": "group",
    "rewards": "rewards",
    "tokens": "tokens",
    "weights": "factors",
    "values": "new_values",
}


def named(field: str) -> str:
    """What the harness calls a field of an input."""
    return NAMES.get(field, field)


@dataclasses.dataclass(frozen=True)
class Ours:
    """How a case is computed here.

    Attributes:
      spec: the algorithm.
      fields: what its batch has in place of, or beside, the fields of the input.
      longest: tokens of the longest completion.
      weight: what the loss is divided by, where it is of a part of a larger batch.
      entropy_weight: the same of the entropy's term.
      step: fields as they were when the step computed its signals, where they have changed since.
      returns: a spec whose advantages are the recorded returns.
      rewarded: the advantages are those of the rewards, not the input's.
      skip: recorded results that are not compared.
    """

    spec: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    longest: int = 16
    weight: float | None = None
    entropy_weight: float | None = None
    step: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    returns: str = ""
    rewarded: bool = False
    skip: tuple[str, ...] = ()


@functools.cache
def inputs() -> dict[str, dict[str, Any]]:
    """The inputs by name, fields under the names of the harness where it has them."""
    read = json.loads((GOLDEN / "inputs.json").read_text())
    return {
        name: {named(key): np.asarray(x) for key, x in fields.items()}
        for name, fields in read.items()
    }


@functools.cache
def cases() -> dict[str, list[Case]]:
    """The recorded cases of each library."""
    read = [json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("verl", "trl", "others")]
    tables = [read[0], read[1], *read[2]]
    return {table["library"]: table["cases"] for table in tables}


def fields_of(case: Case) -> dict[str, Any]:
    """The fields of a case's input."""
    return inputs()[case["inputs"]]


def spec(row: str, *options: Mapping[str, Any], **more: Any) -> str:
    """A spec: options that are None are left out, later ones take the place of earlier ones."""
    found = {}
    for some in (*options, more):
        found |= some
    pairs = [f"{name}={value}" for name, value in found.items() if value is not None]
    return f"{row}?{'&'.join(pairs)}"


def size(case: Case) -> int:
    """The number of sequences."""
    return len(fields_of(case)["mask"])


def tokens(case: Case) -> int:
    """The number of tokens that are learnt from."""
    return int(fields_of(case)["mask"].sum())


def own_rewards(case: Case) -> dict[str, Any]:
    """Rewards of single tokens, of which ours are a penalty.

    The penalty is the k1 of a reference that makes it so, see `OWN`.
    """
    fields = fields_of(case)
    added_BT = fields["token_rewards"] - fields["final_rewards"]
    old_BT = fields.get("old", np.zeros(added_BT.shape))
    return {"old": old_BT, "reference": old_BT + added_BT}


OWN = {"kl": 1.0, "kl_estimator": "k1", "kl_in": "reward"}
"""Options that take k1 from the reward of a token."""
