"""Train steps of DeepSeek-V3.2's shape compiled for TPUs, with the kernels in them.

They are the whole model on a pod, and a layer of a row of 128K on eight chips.
"""

import pytest

from bench.train_steps import (
    ROW,
    StepMemory,
    compile_step,
    live_bitmasks,
    step_memory,
    step_of,
)
from kernels.bitmask import num_words
from plan.hlo import parse
from plan.topology import GIB

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("little_effort")]
SLOW = pytest.mark.slow  # minutes each: `make test-compile-all`

KERNELS = {"warmup": {"select", "sparse_attention", "indexer_normaliser", "indexer_kl"}}
KERNELS["sparse"] = KERNELS["warmup"] | {"sparse_attention_backward"}


def assert_fits(found: StepMemory, stage: str, hbm: int, largest: int) -> None:
    print(found)
    assert found.kernels >= KERNELS[stage]
    assert found.bytes < hbm
    assert not found.square
    assert found.largest <= largest


@pytest.mark.parametrize("stage", ["warmup", pytest.param("sparse", marks=SLOW)])
def test_a_layer_of_128k_tokens_and_128_heads_on_eight_chips(stage):
    """It is as it would be trained, 16 heads and an eighth of the FFN on each device: forward,
    backward and optimizer within a v6e's 32 GB.

    No array has as many elements as there are pairs; the largest are hidden states in float32, then
    the bitmask, of which the attention of a device's heads has the whole row's.
    """
    found = step_memory(compile_step(step_of("row", stage, 1)), ROW)
    assert_fits(found, stage, 32 * GIB, largest=max(4 * ROW * 7_168, 4 * ROW * num_words(ROW)))
    assert found.live_bitmasks <= 1


@SLOW
@pytest.mark.parametrize("layers", [5, 61])
@pytest.mark.parametrize("stage", ["sparse", "warmup"])
def test_the_whole_model_on_a_pod(stage, layers):
    """It has 512 chips of v5p, and a row of 4,096 tokens for each group of 8.

    The largest array is the experts' rows: room for 8 choices of the tokens of 8 groups, and a
    block for each of a device's 32 experts.
    """
    found = step_memory(compile_step(step_of("pod", stage, layers)), 4_096)
    assert_fits(found, stage, 95 * GIB, largest=(8 * 4_096 * 8 + 32 * 512) * 7_168 * 2)


@pytest.mark.parametrize(
    ("last_use", "live"), [("a", 2), ("c", 1)], ids=["two live", "one after the other"]
)
def test_bitmasks_that_live_at_one_time_are_counted(last_use, live):
    """So that check can fail: 1,024 tokens have a bitmask of 32,768 words."""
    text = f"""ENTRY %main (p: s32[4]) -> s32[4] {{
  %p = s32[4]{{0}} parameter(0)
  %a = s32[1024,32]{{1,0}} broadcast(%p), dimensions={{}}
  %b = s32[4]{{0}} custom-call(%a)
  %c = s32[1024,32]{{1,0}} broadcast(%b), dimensions={{}}
  ROOT %d = s32[4]{{0}} custom-call(%{last_use}, %c)
}}
"""
    computations, entry = parse(text)
    assert live_bitmasks(computations[entry], text, 1_024) == live
