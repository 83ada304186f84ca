"""Fine-tunes on conversations: only what the assistant writes is a target, and no conversation sees
another.

    python -m launch.finetune --config=configs/quickstart.py:finetune --workdir=runs/chat
    --config.init_from=runs/mine python -m launch.finetune --config=configs/base.py
    --workdir=runs/chat --config.init_from=runs/mine
    --config.data.sources="('jsonl:chats.jsonl#messages',)"

A source's field holds a list of messages, [{"role": "user", "content": "..."}, {"role":
"assistant", "content": "..."}].
"""

from pathlib import Path

from experiment.command_line import command
from experiment.schema import Config
from experiment.workdir import open_workdir
from launch.pretrain import train


def run(config: Config, workdir: Path) -> bool:
    with open_workdir(workdir, config, "finetune"):
        return train(config, workdir, stage="finetune", chat=True)


if __name__ == "__main__":
    command(run)
