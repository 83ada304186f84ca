"""Record what public libraries compute for the inputs of this folder, in float64 on a CPU.

    python inputs.py
    VERL_USE_EXTERNAL_PLUGINS=none TORCHDYNAMO_DISABLE=1 python record.py verl=PATH trl=PATH ...

Each argument names a library and a checkout of its repository; README.md has the commits. Dr. GRPO
(`r1_zero`) also needs the learner it builds on: OAT_PATH is a checkout of sail-sg/oat, OAT_COMMIT
its commit. The environment needs torch, transformers, tensordict, ray, accelerate, datasets,
omegaconf, hydra-core, codetiming, orjson, peft, pillow, torchdata, cachetools, fastapi, uvicorn,
aiohttp, pydantic and loguru. A file is written anew for the libraries given: verl.json, trl.json,
and others.json, which needs all of its libraries at once.
"""

import subprocess
import sys

from common import HERE, use_double, write

OTHERS = ["openrlhf", "slime", "prime_rl", "areal", "skyrl", "gmpo", "gtpo", "r1_zero", "nemo_rl"]


def commit_of(path):
    """The commit that a checkout is at, or that its archive was made from."""
    marker = f"{path}/COMMIT"
    try:
        with open(marker) as file:
            return file.read().strip()
    except FileNotFoundError:
        done = subprocess.run(
            ["git", "-C", path, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()


def main(arguments):
    """Record the libraries given as name=path."""
    use_double()
    paths = dict(argument.split("=", 1) for argument in arguments)
    if "verl" in paths:
        import record_verl

        write(HERE / "verl.json", [record_verl.record(paths["verl"], commit_of(paths["verl"]))])
    if "trl" in paths:
        import record_trl

        write(HERE / "trl.json", [record_trl.record(paths["trl"], commit_of(paths["trl"]))])
    if all(name in paths for name in OTHERS):
        import record_others

        write(
            HERE / "others.json",
            [getattr(record_others, name)(paths[name], commit_of(paths[name])) for name in OTHERS],
        )


if __name__ == "__main__":
    main(sys.argv[1:])
