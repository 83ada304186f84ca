r"""Reinforcement learning on verifiable tasks: GRPO, Dr.GRPO and their relatives.

The algorithms are the rows of rl/algorithms/table.py.

    python -m launch.reinforce --config=configs/reinforce.py --workdir=runs/rl \
        --config.init_from=runs/chat
    python -m launch.reinforce --config=configs/reinforce.py --workdir=runs/grpo \
        --config.init_from=runs/chat --config.reinforce.algorithm=grpo \
        --config.reinforce.kl_weight=0.01
    python -m launch.reinforce --config=configs/reinforce.py --workdir=runs/own \
        --config.init_from=runs/chat \
        --config.reinforce.task="task:jsonl:problems.jsonl#question,answer" \
        --config.reinforce.rewards="{'answer': 1.0, 'my_rewards.py:brevity': 0.1}"

docs/reinforce.md says what a problem file, a task and a reward of your own look like. A step
samples `reinforce.group_size` completions of `reinforce.prompts_per_step` prompts, rewards them,
and updates epochs x minibatches times; train.steps counts such steps. The same command again goes
on where the run stopped.
"""

from pathlib import Path

from experiment import runs
from experiment.command_line import command
from experiment.schema import Config


def run(config: Config, workdir: Path) -> bool:
    """Returns whether all steps are done, and not stopped before the last."""
    return runs.reinforce(config, workdir)


if __name__ == "__main__":
    command(run)
