"""What a person or a log sees, on a clock the test holds."""

import io

import jax.numpy as jnp
import pytest
from rich.console import Console

from train.progress import WINDOW, Progress


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def progress_on(terminal: bool, total: int, **kwargs):
    clock, out = Clock(), io.StringIO()
    return (
        Progress(
            total,
            "pretrain",
            console=Console(file=out, force_terminal=terminal, width=120),
            clock=clock,
            **kwargs,
        ),
        clock,
        out,
    )


def test_speed_leaves_out_the_compiling_step():
    progress, clock, _ = progress_on(False, total=100)
    assert progress.tokens_per_s == 0
    clock.now += 60  # compiles
    progress.update(1, {}, 512)
    assert progress.tokens_per_s == 0
    for step in (2, 3):
        clock.now += 0.5
        progress.update(step, {}, 512)
    assert progress.tokens_per_s == 1024


def test_speed_is_recent():
    progress, clock, _ = progress_on(False, total=10_000)
    for step in range(200):
        clock.now += 1 if step < 100 else 0.25
        progress.update(step, {}, 10)
    assert WINDOW < 100
    assert progress.tokens_per_s == 40


def test_updates_that_come_at_once_are_one():
    """Bursts of 60 updates, more than a window, each of 10 tokens: one burst a second."""
    progress, clock, out = progress_on(False, total=10_000, every=0)
    for burst in range(4):
        clock.now += 1
        for step in range(60):
            clock.now += 1e-6
            progress.update(60 * burst + step + 1, {}, 10)
    assert progress.tokens_per_s == pytest.approx(600, rel=1e-3)
    assert out.getvalue().splitlines()[-1].endswith("600 tokens/s  0:02:43 left")


def test_updates_closer_than_what_counts_as_one_have_their_speed():
    """A step of 10 ms: what is merged is a tenth of a second, and not all of it for ever."""
    progress, clock, _ = progress_on(False, total=10_000)
    for step in range(2_000):
        clock.now += 0.01
        progress.update(step, {}, 10)
    assert progress.tokens_per_s == pytest.approx(1_000, rel=1e-6)


def test_a_run_that_is_over_at_once_has_a_speed():
    progress, clock, out = progress_on(False, total=4, every=0)
    for step in range(1, 5):
        clock.now += 0.02
        progress.update(step, {}, 10)
    assert progress.tokens_per_s == pytest.approx(500)
    assert "tokens/s" not in out.getvalue()


def test_log_has_a_line_each_so_many_seconds_and_the_last():
    progress, clock, out = progress_on(False, total=40, every=10)
    with progress:
        for step in range(1, 41):
            clock.now += 1
            progress.update(step, {"loss": jnp.float32(2.5)}, 512)
    assert out.getvalue().splitlines() == [
        "pretrain 1/40  loss 2.5",
        "pretrain 11/40  loss 2.5  512 tokens/s  0:00:29 left",
        "pretrain 21/40  loss 2.5  512 tokens/s  0:00:19 left",
        "pretrain 31/40  loss 2.5  512 tokens/s  0:00:09 left",
        "pretrain 40/40  loss 2.5  512 tokens/s  0:00:00 left",
    ]


def test_terminal_has_a_bar():
    progress, clock, out = progress_on(True, total=4)
    with progress:
        for step in range(1, 5):
            clock.now += 1
            progress.update(step, {"loss": 1 / step}, 512)
    assert "4/4" in out.getvalue() and "loss 0.25  512 tokens/s  0:00:00 left" in out.getvalue()


def test_values_that_are_not_shown_are_not_fetched():
    """Fetching waits for the device."""

    class OnDevice:
        def __float__(self):
            raise AssertionError("fetched")

    progress, clock, _ = progress_on(False, total=100, every=10)
    progress.update(1, {"loss": 1.0}, 1)
    clock.now += 1
    progress.update(2, {"loss": OnDevice()}, 1)
    clock.now += 10
    with pytest.raises(AssertionError):
        progress.update(3, {"loss": OnDevice()}, 1)
