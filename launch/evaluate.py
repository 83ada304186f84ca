r"""Evaluates a run: held-out loss, pass@k on problems, infilling, and the indexer's recall.

The loss is that of the held-out documents of data.sources, whatever they are: text, JSONL, Parquet;
of a run of launch.finetune, that of the assistant's words; of one of launch.reinforce, which learns
from no text, there is none. pass@k is unbiased, with bootstrap intervals, of completions whose
reward `evaluate.reward` is at least `evaluate.success`; infilling compares the loss with the suffix
shown to that without. A part whose number in the section `evaluate` is 0 is left out. The newest
checkpoint of a run, and one run with the config of another:

    python -m launch.evaluate --workdir=runs/rl
    python -m launch.evaluate --workdir=runs/rl/eval --config=configs/quickstart.py:reinforce \
        --config.init_from=runs/rl --config.evaluate.samples=64

Writes evaluation.json and samples.jsonl (every prompt, completion and reward) to the workdir.
"""

from pathlib import Path

from experiment import runs
from experiment.command_line import command
from experiment.flags import TEMPLATE_OPTIONS
from experiment.schema import Config, with_template_options

FLAGS = {"template_options": TEMPLATE_OPTIONS}


def run(config: Config, workdir: Path, template_options: str = "") -> dict:
    """Returns what evaluation.json has."""
    return runs.evaluate(with_template_options(config, template_options), workdir)


if __name__ == "__main__":
    command(run, config="recorded", flags=FLAGS)
