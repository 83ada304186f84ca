r"""Fine-tunes on conversations, of which only what the assistant writes is a target.

    python -m launch.finetune --config=configs/quickstart.py:finetune --workdir=runs/chat \
        --config.init_from=runs/mine
    python -m launch.finetune --config=configs/base.py --workdir=runs/chat \
        --config.init_from=runs/mine --config.data.sources="('jsonl:chats.jsonl#messages',)"

    python -m launch.finetune --config=configs/base.py --workdir=runs/preferred \
        --config.init_from=runs/chat --config.finetune.loss=dpo \
        --config.data.sources="('jsonl:pairs.jsonl#chosen,rejected',)"

A source's field has a list of messages, [{"role": "user", "content": "..."},
{"role": "assistant", "content": "..."}]. No conversation sees another. Two fields have a pair, of
which one answer is preferred: docs/preferences.md.
"""

from pathlib import Path

from experiment import runs
from experiment.command_line import command
from experiment.schema import Config


def run(config: Config, workdir: Path) -> bool:
    """Returns whether all steps are done, and not stopped before the last."""
    return runs.finetune(config, workdir)


if __name__ == "__main__":
    command(run)
