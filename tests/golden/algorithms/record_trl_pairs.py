"""Losses over pairs of TRL: DPO and its relatives, CPO with SimPO, ORPO; and GKD's divergence."""

import itertools
import types
from collections import defaultdict

import torch
from common import INPUTS, field, leaf
from library import double_names
from record_trl import accelerator

DPO_TYPES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
]


class Model:
    """A model whose scores are not looked at."""

    training = True

    def __call__(self, **_):
        """Scores of the right shape."""
        rows, width = field("mixed", "mask").shape
        return types.SimpleNamespace(logits=torch.zeros(rows, width + 1, 2))


def dpo(table, kinds, tag, **options):
    """One loss of the DPO trainer: rows 0 to 3 are chosen, rows 4 to 7 rejected."""
    from trl.trainer import dpo_trainer

    wrt = leaf("mixed")
    logps = iter([wrt.clone(), field("mixed", "reference_logprobs")])
    dpo_trainer.selective_log_softmax = lambda scores, labels: next(logps)
    dpo_trainer.is_peft_model = lambda model: False
    mask = field("mixed", "mask").long()
    padded = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask], dim=1)
    given = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "discopop_tau": 0.05,
        **options,
    }
    weights = given.pop("loss_weights", [1.0] * len(kinds))
    stub = types.SimpleNamespace(
        **given,
        args=types.SimpleNamespace(
            discopop_tau=given["discopop_tau"], gradient_checkpointing_kwargs=None
        ),
        loss_types=kinds,
        loss_weights=weights,
        use_weighting=False,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        model=types.SimpleNamespace(training=False, is_gradient_checkpointing=False),
        ref_model=Model(),
        accelerator=accelerator(),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    with double_names():
        loss = dpo_trainer.DPOTrainer._compute_loss(
            stub,
            Model(),
            {"input_ids": padded, "attention_mask": padded, "completion_mask": padded},
            False,
        )
    call = {
        "function": "DPOTrainer._compute_loss",
        "loss_type": kinds,
        "chosen": [0, 1, 2, 3],
        "rejected": [4, 5, 6, 7],
        "ref_logps": "reference_logprobs",
        "loss_weights": weights,
        **{key: given[key] for key in ("beta", "label_smoothing", "f_divergence_type", "ld_alpha")},
    }
    if given["f_divergence_type"] == "alpha_divergence":
        call["f_alpha_divergence_coef"] = given["f_alpha_divergence_coef"]
    if "discopop" in kinds:
        call["discopop_tau"] = given["discopop_tau"]
    table.loss(f"trl/dpo/mixed/{'+'.join(kinds)}/{tag}", call, "mixed", loss, wrt, kind="pair")


def dpo_cases(table):
    """Every type, then temperatures, smoothing, divergences and lengths."""
    for kind in DPO_TYPES:
        smooth = 0.1 if kind in ("exo_pair", "robust", "aot", "aot_unpaired") else 0.0
        dpo(table, [kind], f"beta=0.1,smoothing={smooth}", label_smoothing=smooth)
    for beta in [0.01, 0.5]:
        dpo(table, ["sigmoid"], f"beta={beta}", beta=beta)
        dpo(table, ["ipo"], f"beta={beta}", beta=beta)
    for kind in ["forward_kl", "js_divergence", "alpha_divergence"]:
        dpo(table, ["sigmoid"], f"divergence={kind}", f_divergence_type=kind)
    dpo(table, ["sigmoid"], "ld_alpha=0.4", ld_alpha=0.4)
    dpo(table, ["sigmoid", "bco_pair"], "weights=0.8,0.2", loss_weights=[0.8, 0.2])


def sums(table):
    """Losses that take one log-probability a sequence, as sums or means."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    runs = [("simpo", beta, gamma, 0.0) for beta, gamma in [(0.1, 0.5), (2.0, 1.0), (2.5, 0.3)]]
    runs += [(kind, 0.1, 0.0, 0.0) for kind in ["sigmoid", "hinge", "ipo"]]
    runs += [("sigmoid", 0.1, 0.0, 0.1)]
    for kind, beta, gamma, smooth in runs:
        chosen, rejected = pair_leaves()
        stub = types.SimpleNamespace(
            alpha=0.0,
            loss_type=kind,
            beta=beta,
            simpo_gamma=gamma,
            label_smoothing=smooth,
            accelerator=accelerator(),
        )
        losses, _, _ = CPOTrainer.cpo_loss(stub, chosen, rejected)
        add(
            table,
            f"trl/cpo/pairs/{kind},beta={beta},gamma={gamma},smoothing={smooth}",
            {
                "function": "CPOTrainer.cpo_loss",
                "loss_type": kind,
                "beta": beta,
                "simpo_gamma": gamma,
                "label_smoothing": smooth,
            },
            losses.mean(),
            chosen,
            rejected,
        )
    for beta in [0.1, 1.0]:
        chosen, rejected = pair_leaves()
        stub = types.SimpleNamespace(beta=beta, accelerator=accelerator())
        losses = ORPOTrainer.odds_ratio_loss(stub, chosen, rejected)[0]
        add(
            table,
            f"trl/orpo/pairs/beta={beta}",
            {
                "function": "ORPOTrainer.odds_ratio_loss",
                "beta": beta,
                "loss": "minus the mean of the losses, without the likelihood of the chosen",
            },
            -losses.mean(),
            chosen,
            rejected,
        )


def pair_leaves():
    """The means a token of the log-probabilities of chosen and rejected sequences."""
    return [
        (field("pairs", f"{name}_logps") / field("pairs", f"{name}_lengths"))
        .detach()
        .requires_grad_()
        for name in ("chosen", "rejected")
    ]


def add(table, name, call, loss, chosen, rejected):
    """Keep a loss over pairs with both gradients."""
    first, second = torch.autograd.grad(loss, [chosen, rejected])
    call["logps"] = "chosen_logps / chosen_lengths, rejected_logps / rejected_lengths"
    table.add(
        name, "pair", call, "pairs", loss=loss, gradient_chosen=first, gradient_rejected=second
    )


def distance(table):
    """The divergence between the distributions of a student and a teacher."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    for beta, temperature in itertools.product([0.0, 0.1, 0.5, 1.0], [1.0, 2.0]):
        wrt = leaf("logits", "logits")
        teacher = field("logits", "logits").flip(-1)
        labels = torch.where(field("logits", "mask") > 0, 1, -100)
        loss = GKDTrainer.generalized_jsd_loss(
            wrt, teacher, labels=labels, beta=beta, temperature=temperature
        )
        table.loss(
            f"trl/gkd/logits/beta={beta},temperature={temperature}",
            {
                "function": "GKDTrainer.generalized_jsd_loss",
                "beta": beta,
                "temperature": temperature,
                "student_logits": "logits",
                "teacher_logits": "logits, last axis reversed",
            },
            "logits",
            loss,
            wrt,
            kind="distribution",
            of="logits",
        )


def record(table):
    """Add the cases to TRL's."""
    assert len(INPUTS["mixed"]["mask"]) == 8
    dpo_cases(table)
    sums(table)
    distance(table)
