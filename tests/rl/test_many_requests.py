"""An engine that serves for long keeps nothing of what it has served."""

import os

import numpy as np
import pytest

from rl.config import SamplingConfig
from rl.engine import Engine
from rl.records import RECORDS
from rl.request import Prompt, keys_of
from tests import tiny
from tests.rl.test_engine import MESH, STOPS
from tests.rl.test_speculate import MODELS, D, variables_of
from tests.rl.test_turns import conversation

WIDTH, NEW = 40, 24


@pytest.mark.slow
def test_ten_thousand_requests_leave_memory_and_descriptors_flat():
    """Of mixed lengths, some with turns, some with drafts that are taken, all recorded: as much
    memory after 10,000 as after 2,000, but for 2 % of what allocators do; no descriptor more, and
    no program.
    """
    sampling = SamplingConfig(max_prompt_tokens=WIDTH, max_new_tokens=NEW, drafts=D, top_p=0.95)
    own = Engine(MODELS["rewound"], MESH, sampling, rows=32, record=RECORDS)
    own.load(variables_of("rewound"))
    keys = keys_of(0, range(10_000), 1)
    rng, seen, ended = np.random.default_rng(0), {}, 0
    reply = conversation(3, turns=1)

    def prompts(first: int, count: int):
        for number in range(first, first + count):
            tokens = rng.integers(20, tiny.VOCAB, int(rng.integers(1, WIDTH + 1))).tolist()
            new = int(rng.integers(1, NEW - 5))
            asks = reply if number % 5 == 0 else None
            yield Prompt(tokens, keys[number], new, STOPS, group=number, reply=asks)

    for first in range(0, 10_000, 500):
        ended += sum(1 for _ in own.run(prompts(first, 500)))
        seen[first + 500] = used()
    assert ended == 10_000
    memory, descriptors = seen[2_000]
    assert seen[10_000][0] <= 1.02 * memory, seen
    assert seen[10_000][1] == descriptors, seen


def used() -> tuple[int, int]:
    """Returns the bytes of memory that the process has, and its open descriptors."""
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))
