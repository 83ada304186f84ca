r"""Right and wrong solutions of word problems, told apart by DPO.

The model of configs/sums.py, which guesses six answers in ten, learns from pairs of a right
solution and a wrong one: its last step is wrong, or it guesses. These lines write the pairs:

    import json, random
    from data.tasks.arithmetic import Arithmetic

    task, rng = Arithmetic(min_ops=3, max_ops=5, max_value=9, contexts=3), random.Random(0)
    with open("runs/pairs.jsonl", "w") as file:
        for _ in range(4000):
            problem = task.problem(rng)
            steps, answer = problem.trace.rpartition("=")[0], int(problem.answer)
            wrong = (answer + rng.randint(1, 9)) % 10
            thought = rng.choice((f"{steps}={wrong}", ""))
            record = {
                "prompt": problem.question,
                "chosen": f"<think>{steps}={answer}</think><answer>{answer}</answer>",
                "rejected": f"<think>{thought}</think><answer>{wrong}</answer>",
            }
            file.write(json.dumps(record) + "\n")

    python -m launch.finetune --config=configs/sums.py:finetune --workdir=runs/sums
    python -m launch.finetune --config=configs/pairs.py --workdir=runs/pairs
    python -m launch.evaluate --workdir=runs/pairs --config.evaluate.problems=128

It tells 0.97 of held-out pairs apart (validation_rewards/accuracies), and pass@1 on held-out
problems rises from 0.33 (0.28 to 0.38) to 0.63 (0.56 to 0.69). A minute of one core for the run on
pairs (2026-12-01, jax 0.10.2, seed 0).
"""

from typing import Any

from configs import sums


def get_config() -> Any:
    """Returns the config of the run on pairs."""
    c = sums.finetune()
    c.init_from = "runs/sums"
    c.finetune.loss = "dpo?beta=0.1"
    c.data.sources = ("jsonl:runs/pairs.jsonl#chosen,rejected",)
    c.data.seq_len = 640  # two pairs
    c.data.batch_size = 8
    c.train.steps = 60
    c.train.optimizer = "adamw"
    c.train.learning_rate = 3e-4
    c.train.eval_every = 20
    c.train.eval_batches = 8
    c.reinforce.task = sums.TASK
    c.evaluate.text_batches = 8
    c.evaluate.samples = 4
    return c
