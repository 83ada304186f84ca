"""Losses and masks of the authors of GMPO, GTPO and Dr. GRPO."""

import gc
import itertools
import logging
import os
import time
import types

import numpy as np
import torch
from common import INPUTS, Cases, field, leaf, text, whole
from library import double_names, load


class Rows:
    """A stand-in for the learner of oat: scores are looked up by row."""

    def __init__(self, inputs, options, aggregator):
        self.args = types.SimpleNamespace(
            **{
                "reward_scale": 1.0,
                "train_batch_size_per_device": 1,
                "temperature": 1.0,
                "num_ppo_epochs": 1,
                "reinforce_update": False,
                "num_samples": 4,
                "beta": 0.0,
                "kl_penalty_coef": 0.0,
                "critic_type": "drgrpo",
                "tis_c": None,
                "cliprange": 0.2,
                "critic_type_modify": "none",
                **options,
            }
        )
        self.inputs, self.wrt, self.losses = inputs, leaf(inputs), []
        self.ref_model = "reference" if self.args.beta > 0 else None
        self.optimizer = self.scheduler = None
        self.masked_aggregator = aggregator
        self.model = lambda ids, attention_mask: {"logits": torch.zeros(*ids.shape, 2)}
        self.strategy = types.SimpleNamespace(
            backward=lambda loss, *_: self.losses.append(loss),
            grad_acc_step=1,
            get_gradient_norm=lambda model: 0.0,
            optimizer_step=lambda *_: None,
        )

    def get_completion_mask(self, attention, prompt_lengths):
        """One token of prompt, then the mask."""
        mask = field(self.inputs, "mask").bool()
        return torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask], dim=1)

    def rows(self, key, ids):
        """The log-probabilities of the rows whose number stands in the ids."""
        if not torch.is_grad_enabled():
            key = field(self.inputs, key)
        else:
            key = self.wrt
        return key[ids[:, 0]][:, : ids.shape[1] - 1]

    def of_scores(self, scores, ids, mask):
        """What the authors of GMPO compute from scores."""
        return self.rows("old_logprobs", ids)

    def of_model(self, model, input_ids, **_):
        """What oat computes from a model: log-probabilities and entropies."""
        key = "reference_logprobs" if model == "reference" else "old_logprobs"
        found = self.rows(key, input_ids)
        return found, torch.zeros_like(found)

    def take(self, name, module, method=None):
        """Give the learner a method of a module, or the one given."""
        setattr(self, name, method or types.MethodType(getattr(module, name), self))

    def learn(self, module):
        """The mean of the losses of the step's minibatches."""
        mask = whole(self.inputs, "mask")
        count, width = mask.shape
        number = torch.arange(count).unsqueeze(1).repeat(1, width + 1)
        lengths = torch.ones(count, 1, dtype=torch.long)
        rewards = [[reward] for reward in INPUTS[self.inputs]["rewards"]]
        sampler = field(self.inputs, "sampler_logprobs")
        module.learning_step(
            self,
            {
                "input_ids": number,
                "attention_mask": torch.cat([lengths, torch.ones_like(mask)], 1),
                "rewards": rewards,
                "prompt_ids_lens": [1] * count,
                "loss_masks": [1.0] * count,
                "action_logprobs": [
                    row[kept.bool()].tolist() for row, kept in zip(sampler, mask, strict=True)
                ],
            },
        )
        return torch.stack([loss.reshape(()) for loss in self.losses]).mean()


def ordered():
    """numpy without the shuffle."""
    return types.SimpleNamespace(random=types.SimpleNamespace(permutation=np.arange))


def gmpo(path, commit):
    """The authors' GMPO: geometric means, one sequence a minibatch."""
    table = Cases("gmpo", commit)
    torch.cuda.current_device = lambda: "cpu"
    for inputs, (kind, clip) in itertools.product(
        ["mixed", "holes"],
        [
            ("gmpo", 0.4),
            ("gmpo", 0.1),
            ("gmpo_noclip", 0.0),
            ("gmpo_seqclip", 0.1),
            ("gmpo_without_norm", 0.4),
        ],
    ):
        taken = load(
            f"{path}/train_zero_math_gmpo.py",
            ["learning_step", "compute_monte_carlo_advantages"],
            np=ordered(),
            gc=gc,
            time=time,
            logging=logging,
            entropy_from_logits=lambda scores: scores[..., 0],
            masked_mean=lambda values, mask, axis=None: values.sum(),
        )
        stub = Rows(inputs, {"critic_type_modify": kind, "cliprange": clip}, None)
        stub.take("compute_monte_carlo_advantages", taken)
        stub.take("get_batch_logps", None, stub.of_scores)
        loss = stub.learn(taken)
        table.loss(
            f"gmpo/{kind}/{inputs}/cliprange={clip}",
            {
                "function": "learning_step",
                "critic_type": "drgrpo",
                "critic_type_modify": kind,
                "cliprange": clip,
                "advantages": "rewards less the mean of four",
                "reduced": "mean over minibatches of one sequence",
            },
            inputs,
            loss,
            stub.wrt,
        )
    return table


def r1_zero(path, commit):
    """Dr. GRPO: the step of oat's learner with the authors' advantages and sums."""
    table = Cases("r1_zero", commit, oat=os.environ.get("OAT_COMMIT", ""))
    torch.cuda.current_device = lambda: "cpu"
    oat = os.environ["OAT_PATH"]
    tools = load(f"{oat}/oat/utils/ops.py", ["masked_sum", "masked_mean"])
    taken = load(
        f"{oat}/oat/algorithms/ppo.py",
        ["learning_step"],
        np=ordered(),
        gc=gc,
        time=time,
        logging=logging,
        masked_mean=tools.masked_mean,
        masked_sum=tools.masked_sum,
    )
    scores = load(f"{path}/train_zero_math.py", ["compute_monte_carlo_advantages"])
    runs = [
        {},
        {"critic_type": "grpo"},
        {"critic_type": "grpo", "beta": 0.04},
        {"beta": 0.04},
        {"tis_c": 1.5},
        {"train_batch_size_per_device": 4},
    ]
    for inputs, options in itertools.product(["mixed", "holes"], runs):
        if options.get("critic_type") == "grpo":
            aggregator = tools.masked_mean
        else:

            def aggregator(values, mask, axis):
                return tools.masked_sum(values, mask, axis, 16)

        stub = Rows(inputs, options, aggregator)
        stub.take("compute_monte_carlo_advantages", scores)

        stub.take("get_batch_logps", None, stub.of_model)
        loss = stub.learn(taken)
        given = {
            "critic_type": "drgrpo",
            "cliprange": 0.2,
            "train_batch_size_per_device": 1,
            "generate_max_length": 16,
            **options,
        }
        table.loss(
            f"r1_zero/learning_step/{inputs}/{text(options)}",
            {
                "function": "learning_step",
                **given,
                "action_logprobs": "sampler_logprobs",
                "advantages": "compute_monte_carlo_advantages of rewards in groups of four",
                "reduced": "mean over minibatches",
            },
            inputs,
            loss,
            stub.wrt,
        )
    for inputs, kind in itertools.product(["mixed"], ["drgrpo", "grpo"]):
        stub = types.SimpleNamespace(args=types.SimpleNamespace(num_samples=4, critic_type=kind))
        found = scores.compute_monte_carlo_advantages(stub, field(inputs, "final_rewards"), None)
        table.add(
            f"r1_zero/advantages/{inputs}/{kind}",
            "advantage",
            {
                "function": "compute_monte_carlo_advantages",
                "critic_type": kind,
                "rewards": "final_rewards",
                "num_samples": 4,
            },
            inputs,
            advantages=found,
        )
    return table


def gtpo(path, commit):
    """GTPO: weights of conflicting tokens, and the loss through its own autograd function."""
    table = Cases("gtpo", commit)
    taken = load(
        f"{path}/gtpo/gtpo_training.py",
        [
            "ENT_THRESHOLD",
            "ENT_SCALE",
            "W_RAW",
            "EPS",
            "build_conflict_mask",
            "gtpo_compute_loss",
            "compute_completion_stats",
            "UnslothEfficientGTPO",
        ],
        PAD_ID=0,
        wandb=types.SimpleNamespace(run=None),
    )
    tokens, mask = whole("conflicts", "tokens"), whole("conflicts", "mask")
    signs = whole("conflicts", "signs")
    for name, rows in [("first", slice(0, 3)), ("second", slice(3, 6)), ("both", slice(0, 6))]:
        with double_names():
            weights, conflict, count = taken.build_conflict_mask(
                tokens[rows], mask[rows], signs[rows] > 0, signs[rows] < 0, 10
            )
        table.add(
            f"gtpo/build_conflict_mask/conflicts/{name}",
            "mask",
            {
                "function": "build_conflict_mask",
                "rows": list(range(6))[rows],
                "PAD_ID": 0,
                "W_RAW": 2.0,
            },
            "conflicts",
            weights=weights,
            mask=conflict,
            counts=count,
        )
    for name, rows in [("first", slice(0, 3)), ("second", slice(3, 6)), ("both", slice(0, 6))]:
        scores = leaf("conflicts", "logits")
        advantages = field("conflicts", "sequence_advantages")[rows]
        group = scores[rows]
        padded = torch.cat([group, torch.zeros_like(group[:, :1])], dim=1).unsqueeze(0)
        with double_names():
            loss, _tokens_seen, _ = taken.UnslothEfficientGTPO.apply(
                padded,
                padded.detach(),
                torch.eye(10),
                tokens[rows].unsqueeze(0),
                mask[rows].unsqueeze(0),
                advantages,
                field("conflicts", "rewards")[rows],
                0.0,
                None,
                1,
            )
        (whole_gradient,) = torch.autograd.grad(loss.sum(), scores)
        chosen = tokens.unsqueeze(-1)
        probability = scores.detach().softmax(-1).gather(-1, chosen)
        gradient = (whole_gradient.gather(-1, chosen) / (1 - probability)).squeeze(-1)
        entropy = torch.stack(
            [
                taken.compute_completion_stats(one, one, ids, kept)[0]
                for one, ids, kept in zip(scores.detach(), tokens, mask, strict=True)
            ]
        )
        table.add(
            f"gtpo/UnslothEfficientGTPO/conflicts/{name}",
            "loss",
            {
                "function": "UnslothEfficientGTPO.forward",
                "rows": list(range(6))[rows],
                "advantages": "sequence_advantages",
                "beta": 0.0,
                "ENT_THRESHOLD": 0.7,
                "ENT_SCALE": 0.1,
                "W_RAW": 2.0,
            },
            "conflicts",
            loss=loss.sum(),
            gradient=gradient,
            entropies=entropy[rows],
            logprobs=scores.detach().log_softmax(-1).gather(-1, chosen).squeeze(-1),
        )
    return table
