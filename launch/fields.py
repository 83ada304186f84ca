"""Prints the fields of a config: name, default, meaning.

    python -m launch.fields
    python -m launch.fields model.moe

The sections are tokenizer, model, mesh, data, train, sampling, reinforce and evaluate.
"""

from experiment.command_line import command
from experiment.fields import describe


def run(names: list[str]) -> None:
    """Prints the fields of the named sections, or all."""
    for name in names or [""]:
        print(describe(name))


if __name__ == "__main__":
    command(run, config="none", workdir=False, rest="names")
