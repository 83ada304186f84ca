"""What the recorders share: tensors of an input, one case, one file."""

import json
import math
import pathlib

import torch

HERE = pathlib.Path(__file__).parent
INPUTS = json.loads((HERE / "inputs.json").read_text())


def use_double():
    """Make float64 the type of everything a library makes without naming one.

    Several libraries cast to float32 inside; those casts become casts to float64, so that a
    recorded number is the formula and not its rounding.
    """
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double


def field(name, key):
    """A field of an input as float64."""
    return torch.tensor(INPUTS[name][key], dtype=torch.float64)


def whole(name, key):
    """A field of an input as whole numbers."""
    return torch.tensor(INPUTS[name][key], dtype=torch.long)


def leaf(name, key="logprobs"):
    """A field of an input that gradients are taken with respect to."""
    return field(name, key).requires_grad_()


def plain(value):
    """A tensor, number or container of them as what JSON holds."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.dtype == torch.bool:
            value = value.long()
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        return plain(value.item())
    return value


def short(value):
    """Numbers to 15 digits, whole ones without a fraction, so that files stay small."""
    if isinstance(value, list):
        return [short(item) for item in value]
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    if isinstance(value, float) and math.isfinite(value):
        value = float(f"{value:.15g}")
        return int(value) if value.is_integer() else value
    return value


def text(options):
    """Options as a short text for a case's name."""
    return ",".join(f"{key}={value}" for key, value in options.items()) or "defaults"


def of_sequences(advantages, mask):
    """One number a sequence where all its tokens have the same, else the places of the mask."""
    if advantages.dim() != 2 or advantages.shape != mask.shape:
        return advantages
    advantages = advantages * mask
    first = advantages.gather(1, mask.long().argmax(dim=1, keepdim=True)).squeeze(1)
    return first if torch.equal(first.unsqueeze(1) * mask, advantages) else advantages


class Cases:
    """The cases of one library, under names that may be given once."""

    def __init__(self, library, commit, **about):
        self.head = {"library": library, "commit": commit, **about}
        self.cases = {}

    def add(self, name, kind, call, inputs, **values):
        """Keep one case; every value must be finite unless it is text or null."""
        if name in self.cases:
            raise ValueError(f"two cases are named {name}")
        for key in {"advantages", "returns"} & set(values):
            if isinstance(values[key], torch.Tensor):
                values[key] = of_sequences(values[key], field(inputs, "mask"))
        if plain(values.get("returns")) == plain(values.get("advantages")):
            values.pop("returns", None)
        case = {
            "id": name,
            "library": self.head["library"],
            "kind": kind,
            "call": plain(call),
            "inputs": inputs,
            **{key: short(plain(value)) for key, value in values.items()},
        }
        json.dumps(case, allow_nan=False)
        self.cases[name] = case

    def loss(self, name, call, inputs, loss, wrt, kind="loss", of="logprobs", **more):
        """Keep a loss with its gradient; `wrt` is the tensor, `of` the field it came from."""
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, wrt, allow_unused=True)
        if gradient is not None:
            more["gradient"] = gradient
        else:
            more["gradient"] = None
        if of != "logprobs":
            more["gradient_of"] = of
        self.add(name, kind, call, inputs, loss=loss, **more)

    def divergence(self, name, call, inputs, values, wrt, mask=None, of="logprobs"):
        """Keep values a token and the gradient of their sum."""
        total = values.sum() if mask is None else (values * mask).sum()
        (gradient,) = torch.autograd.grad(total, wrt)
        self.add(
            name,
            "divergence",
            call,
            inputs,
            values=values,
            gradient=gradient,
            **({} if of == "logprobs" else {"gradient_of": of}),
        )

    def text(self):
        """The head on the first line, then one case a line."""
        head = json.dumps(self.head)[:-1]
        lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in self.cases.values())
        return f'{head}, "cases": [\n{lines}\n]}}\n'

    def counts(self):
        """How many cases there are of each kind."""
        kinds = [case["kind"] for case in self.cases.values()]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def write(path, tables):
    """Write the tables of one file: one library alone, or a list of several."""
    if len(tables) == 1:
        path.write_text(tables[0].text())
    else:
        path.write_text("[\n" + ",\n".join(table.text().rstrip() for table in tables) + "\n]\n")
    for table in tables:
        print(path.name, table.head["library"], len(table.cases), table.counts())
