"""Record what TRL's trainers compute of pairs, from scores of words to losses, on a CPU in float64.

    TRL_EXPERIMENTAL_SILENCE=1 python tests/golden/preferences/record.py

It needs torch 2.13.0, transformers 5.24.0 and trl 1.16.0, in an environment of their own, takes ten
seconds, and writes trl.json beside it: "pairs", the tokens and scores that all cases share, and
"cases". A model whose scores are given stands in for a language model; all else is TRL's:
`DPOTrainer._compute_loss`, and `get_batch_loss_metrics` of `CPOTrainer` and `ORPOTrainer`.
"""

import json
import pathlib
import random
import types
from collections import defaultdict

import torch

HERE = pathlib.Path(__file__).parent
VOCAB = 5
# Lengths of the prompt, the chosen and the rejected answer of each pair.
LENGTHS = [(3, 4, 6), (2, 5, 1), (4, 2, 2), (1, 3, 4)]
SIDES = ("chosen", "rejected")
COUNT = len(LENGTHS)
LONGEST = max(prompt + max(answers) for prompt, *answers in LENGTHS)


def make_pairs():
    """Tokens, and scores of a policy and of a reference for each of them, by pair and side."""
    chance = random.Random(3)
    pairs = []
    for prompt_length, *lengths in LENGTHS:
        prompt = [chance.randrange(1, VOCAB) for _ in range(prompt_length)]
        pair: dict = {"prompt": prompt_length}
        for side, length in zip(SIDES, lengths, strict=True):
            tokens = prompt + [chance.randrange(1, VOCAB) for _ in range(length)]
            pair[side] = tokens
            for name in ("policy", "reference"):
                pair[f"{side}_{name}"] = [
                    [round(chance.uniform(-2, 2), 3) for _ in range(VOCAB)] for _ in tokens
                ]
        pairs.append(pair)
    return pairs


def padded(rows, value, dtype):
    """Rows of one length, those of `LONGEST` tokens."""
    filled = [row + [value] * (LONGEST - len(row)) for row in rows]
    return torch.tensor(filled, dtype=dtype)


def scores(pairs, name):
    """Scores [2 pairs, LONGEST, VOCAB], the chosen first."""
    rows = [pair[f"{side}_{name}"] for side in SIDES for pair in pairs]
    return padded(rows, [0.0] * VOCAB, torch.float64)


def of_side(pairs, side):
    """Ids, the mask of all tokens, and labels of the answers, of one side."""
    ids = padded([pair[side] for pair in pairs], 0, torch.long)
    mask = padded([[1] * len(pair[side]) for pair in pairs], 0, torch.long)
    answers = [[0] * pair["prompt"] + [1] * (len(pair[side]) - pair["prompt"]) for pair in pairs]
    return ids, mask, padded(answers, 0, torch.long)


class Model:
    """Scores that are given, with what TRL's fused head says of them."""

    training = True
    is_gradient_checkpointing = False

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, *_, labels=None, **__):
        if labels is None:
            return types.SimpleNamespace(logits=self.scores)
        next_labels = labels[:, 1:]
        log_probs = self.scores[:, :-1].log_softmax(-1)
        kept = next_labels != -100
        found = log_probs.gather(-1, next_labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        zeros = torch.zeros_like(found)
        return types.SimpleNamespace(
            log_probs=torch.where(kept, found, zeros),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


def accelerator():
    """One process."""

    def same(x):
        return x

    return types.SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, unwrap_model=same
    )


def dpo(pairs, policy, kinds, weights, beta):
    """The loss and the metrics of the DPO trainer."""
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = object.__new__(DPOTrainer)
    trainer.__dict__ |= {
        "beta": beta,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "use_weighting": False,
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "loss_types": kinds,
        "loss_weights": weights,
        "model": Model(policy),
        "ref_model": Model(scores(pairs, "reference")),
        "accelerator": accelerator(),
        "args": types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    sides = [of_side(pairs, side) for side in SIDES]
    ids, mask, answers = (torch.cat(each) for each in zip(*sides, strict=True))
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": answers}
    loss = trainer._compute_loss(trainer.model, inputs, False)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss, metrics


def without_reference(trainer, pairs, policy):
    """The loss and the metrics of a trainer of `trl.experimental`."""
    batch = {}
    for side in SIDES:
        ids, mask, answers = of_side(pairs, side)
        batch |= {
            f"{side}_input_ids": ids,
            f"{side}_attention_mask": mask,
            f"{side}_labels": torch.where(answers > 0, ids, -100),
        }
    trainer.__dict__ |= {
        "accelerator": accelerator(),
        "is_encoder_decoder": False,
        "aux_loss_enabled": False,
        "pad_token_id": 0,
        "padding_value": 0,
    }
    return trainer.get_batch_loss_metrics(Model(policy), batch, "train")


def cpo(pairs, policy, beta, gamma, alpha, smoothing):
    """SimPO, or with `alpha` CPO-SimPO."""
    from trl.experimental.cpo import CPOTrainer

    trainer = object.__new__(CPOTrainer)
    trainer.__dict__ |= {"loss_type": "simpo", "beta": beta, "simpo_gamma": gamma, "alpha": 0.0}
    trainer.__dict__ |= {"cpo_alpha": alpha, "label_smoothing": smoothing}
    return without_reference(trainer, pairs, policy)


def orpo(pairs, policy, beta):
    """ORPO, whose likelihood is of all tokens of the chosen conversations."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = object.__new__(ORPOTrainer)
    trainer.__dict__ |= {"beta": beta}
    return without_reference(trainer, pairs, policy)


KEPT = ("rewards/", "logps/", "nll_loss", "log_odds")


def main():
    """Record every case, by the string that names the loss in our config."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    pairs = make_pairs()
    smoothed = "simpo?beta=2.5&gamma=0.3&label_smoothing=0.1"
    cases = {
        "dpo": lambda p: dpo(pairs, p, ["sigmoid"], [1.0], 0.1),
        "dpo?beta=0.5": lambda p: dpo(pairs, p, ["sigmoid"], [1.0], 0.5),
        "dpo?form=hinge&beta=0.3": lambda p: dpo(pairs, p, ["hinge"], [1.0], 0.3),
        "dpo?form=ipo&logps=mean": lambda p: dpo(pairs, p, ["ipo"], [1.0], 0.1),
        "dpo?logps=mean&beta=2.0": lambda p: dpo(pairs, p, ["sigmoid_norm"], [1.0], 2.0),
        "dpo?nll=0.7&nll_mean=token": lambda p: dpo(pairs, p, ["sigmoid", "sft"], [1.0, 0.7], 0.1),
        "simpo": lambda p: cpo(pairs, p, 2.0, 1.0, 0.0, 0.0),
        smoothed: lambda p: cpo(pairs, p, 2.5, 0.3, 0.0, 0.1),
        "simpo?nll=0.5&nll_mean=token": lambda p: cpo(pairs, p, 2.0, 1.0, 0.5, 0.0),
        "orpo?nll_mean=token&nll_of=conversation": lambda p: orpo(pairs, p, 0.1),
        "orpo?weight=0.7&nll_mean=token&nll_of=conversation": lambda p: orpo(pairs, p, 0.7),
    }
    found = {}
    for spec, compute in cases.items():
        policy = scores(pairs, "policy").requires_grad_()
        loss, metrics = compute(policy)
        (gradient,) = torch.autograd.grad(loss, policy)
        rows = iter(gradient.tolist())
        found[spec] = {
            "loss": loss.item(),
            "metrics": {name: value for name, value in metrics.items() if name.startswith(KEPT)},
            "gradient": {side: [next(rows)[: len(pair[side])] for pair in pairs] for side in SIDES},
        }
    text = json.dumps({"pairs": pairs, "cases": found}, default=float)
    rounded = json.loads(text, parse_float=lambda number: float(f"{float(number):.12g}"))
    lines = ",\n".join(
        f"{json.dumps(spec)}: {json.dumps(case)}" for spec, case in rounded["cases"].items()
    )
    head = json.dumps({"trl": "1.16.0", "pairs": rounded["pairs"]})[:-1]
    (HERE / "trl.json").write_text(f'{head}, "cases": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
