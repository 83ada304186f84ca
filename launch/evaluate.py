r"""Evaluates a run: held-out loss, pass@k on problems, infilling, and the indexer's recall.

The loss is that of the held-out documents of data.sources, whatever they are: text, JSONL, Parquet;
of a run of launch.finetune, that of the assistant's words, or its loss over pairs with what the run
logs of them; of one of launch.reinforce, which learns from no text, there is none. pass@k is
unbiased, with bootstrap intervals, of completions whose reward `evaluate.reward` is at least
`evaluate.success`; infilling compares the loss with the suffix shown to that without. A part whose
number in the section `evaluate` is 0 is left out. The newest checkpoint of a run, and one run with
the config of another:

    python -m launch.evaluate --workdir=runs/rl
    python -m launch.evaluate --workdir=runs/rl/eval --config=configs/quickstart.py:reinforce \
        --config.init_from=runs/rl --config.evaluate.samples=64

Writes evaluation.json, samples.jsonl (every prompt, completion and reward) and problems.jsonl (a
problem a line) to the workdir. Several temperatures, and forced lengths of thought, in one run:

    python -m launch.evaluate --workdir=runs/rl --config.evaluate.temperatures="(0.6, 1.0)" \
        --config.evaluate.samples=256 --config.evaluate.thinking="(16, 32, 64)"

The problems that launch.reinforce trains on, for reinforce.pass_rates_from (docs/reinforce.md):

    python -m launch.evaluate --workdir=runs/hot --config=configs/reinforce.py \
        --config.init_from=runs/chat --config.evaluate.split=train \
        --config.evaluate.problems=1_000_000 --config.evaluate.thinking="(1,)" \
        --config.evaluate.samples=10 --config.evaluate.text_batches=0

Two evaluated runs, of which the first is the base: paired differences, where pass@k crosses and the
sampling-efficiency gap, in comparison.json beside the first, or in --workdir; and how likely the
base finds what another run wrote, in perplexity.json:

    python -m launch.evaluate --compare=runs/base,runs/rl
    python -m launch.evaluate --workdir=runs/rl --perplexity_under=runs/base

docs/evaluate.md says how each figure is computed.
"""

import sys
from pathlib import Path

from errors import UserError
from experiment import runs, two_runs
from experiment.command_line import command
from experiment.flags import TEMPLATE_OPTIONS, Flag
from experiment.schema import Config, with_template_options

COMPARE = Flag("", "A,B: two evaluated runs that are compared, in place of all else")
PERPLEXITY = Flag(
    "", "a run, an evaluation or hf:DIR: how likely its model finds what --workdir's wrote"
)
FLAGS = {"template_options": TEMPLATE_OPTIONS, "compare": COMPARE, "perplexity_under": PERPLEXITY}
OF_COMPARISON = {
    "compare": COMPARE,
    "workdir": Flag("", "where comparison.json is written, in place of A"),
}
OF_PERPLEXITY = {
    "perplexity_under": PERPLEXITY,
    "perplexity_samples": Flag(16, "completions of a problem that are measured, the first ones"),
}


def run(config: Config, workdir: Path, template_options: str = "", **others: str) -> dict:
    """Returns what evaluation.json has.

    Args:
      others: flags by which `main` chooses `run_comparison` or `run_perplexity`: not given here.
    """
    del others
    return runs.evaluate(with_template_options(config, template_options), workdir)


def run_perplexity(workdir: Path, perplexity_under: str, perplexity_samples: int = 16) -> dict:
    """Measures completions under another model, and returns what perplexity.json has."""
    if perplexity_samples < 1:
        raise UserError(f"--perplexity_samples={perplexity_samples}: must be at least 1")
    result = two_runs.perplexity_under(workdir, perplexity_under, perplexity_samples)
    two_runs.print_perplexity(result)
    return result


def run_comparison(compare: str, workdir: str) -> dict:
    """Compares two evaluated runs, and returns what comparison.json has."""
    names = [name for name in compare.split(",") if name]
    if len(names) != 2:
        raise UserError(f"--compare={compare}: must name two evaluated workdirs, as runs/a,runs/b")
    result = two_runs.compare(Path(names[0]), Path(names[1]), Path(workdir or names[0]))
    two_runs.print_comparison(result)
    return result


def main() -> None:
    """Compares two runs, or measures what one wrote, which needs no config; or evaluates one."""
    given = {word.lstrip("-").partition("=")[0] for word in sys.argv[1:]}
    if "compare" in given:
        command(run_comparison, config="none", workdir=False, flags=OF_COMPARISON)
    elif "perplexity_under" in given:
        command(run_perplexity, config="none", flags=OF_PERPLEXITY)
    else:
        command(run, config="recorded", flags=FLAGS)


if __name__ == "__main__":
    main()
