"""The inputs that every library was given.

Run it to write inputs.json; the recorders read that file. Numbers are drawn once from a seeded
generator of the standard library and rounded, so that the file is short and float32 holds them
well. Log-ratios are written by hand, so that each bound is crossed in both directions with both
signs of advantage.
"""

import json
import pathlib
import random

HERE = pathlib.Path(__file__).parent

# Log-ratios of the eight sequences: rows 0 and 4 have a positive advantage, rows 1 and 5 a
# negative one, row 3 none. Row 6 differs much at its start. Row 2 has one token, row 5 two whose
# mean is below 3e-4.
LOG_RATIOS = [
    [0.004, -0.003, 0.15, -0.12, 0.35, -0.4, 0.9, -0.8, 1.5, -1.4, 0.22, -0.26],
    [-0.005, 0.002, -0.14, 0.11, -0.38, 0.33, -0.95, 0.85, -1.45, 1.3, -0.27, 0.21],
    [-0.45],
    [0.6, -0.6, 0.05, 0.3],
    [0.25, 0.31, -0.02, 0.27, 0.012, -0.24, 0.45, -0.018, 0.08],
    [0.0203, -0.0199],
    [-1.35, -1.2, 0.9, 0.03, -0.06, 0.013, 0.24],
    [1.4, 0.7, 0.02, -0.03, -0.29],
]
ADVANTAGES = [1.2, -0.7, -1.1, 0.0, 0.9, -0.4, 0.5, -0.3]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]
REWARDS = [1.0, 0.0, 0.25, 0.5, 0.75, 0.75, 0.75, 0.75]
NAMED_REWARDS = [
    [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0],
    [0.5, 0.25, -0.5, 0.125, 0.0, 0.75, -0.25, 0.5],
    [-0.25, 0.0, 0.0, -0.5, -0.125, 0.0, -0.25, -0.375],
]
RAGGED_GROUPS = [4, 2, 4, 7, 2, 2, 9, 9, 4, 2]
RAGGED_REWARDS = [1.0, 0.5, 0.0, 0.75, -0.25, 1.0, 0.5, 0.5, 0.25, 0.125]
RAGGED_LENGTHS = [5, 6, 1, 3, 2, 6, 4, 2, 3, 6]


def draw(chance, mask, low, high, digits=3):
    """Uniform numbers for each place of the mask, padding included."""
    return [[round(chance.uniform(low, high), digits) for _ in row] for row in mask]


def spread(chance, mask, small, large, share):
    """Mostly small offsets of both signs and, for a share of places, large ones."""

    def offset():
        scale = large if chance.random() < share else small
        return round(chance.choice([-1, 1]) * chance.uniform(0.3, 1.0) * scale, 4)

    return [[offset() for _ in row] for row in mask]


def plus(left, right):
    """The places of two matrices added."""
    return [
        [round(a + b, 6) for a, b in zip(x, y, strict=True)]
        for x, y in zip(left, right, strict=True)
    ]


def prefix_mask(lengths, width):
    """Ones for the first tokens of each row."""
    return [[int(place < length) for place in range(width)] for length in lengths]


def over_tokens(numbers, mask):
    """One number a sequence, written at each of its tokens."""
    return [[number * kept for kept in row] for number, row in zip(numbers, mask, strict=True)]


def fields_about(chance, mask, rewards):
    """The fields that do not depend on the log-ratio."""
    last = [max(place for place, kept in enumerate(row) if kept) for row in mask]
    shaped = draw(chance, mask, -0.2, 0.2)
    final = [
        [reward if place == end else 0.0 for place in range(len(row))]
        for reward, end, row in zip(rewards, last, mask, strict=True)
    ]
    values = draw(chance, mask, -0.5, 1.0)
    return {
        "entropies": draw(chance, mask, 0.05, 2.6),
        "values": values,
        "old_values": plus(values, spread(chance, mask, 0.1, 0.7, 0.4)),
        "returns": draw(chance, mask, -0.6, 1.2),
        "final_rewards": final,
        "token_rewards": [
            [round((a + b) * kept, 6) for a, b, kept in zip(x, y, z, strict=True)]
            for x, y, z in zip(final, shaped, mask, strict=True)
        ],
        "weights": [[abs(number) for number in row] for row in draw(chance, mask, 0.0, 2.0)],
        "sum_pi_squared": draw(chance, mask, 0.1, 0.9),
    }


def mixed(chance):
    """Two groups of four sequences of 1 to 12 tokens."""
    width = max(len(row) for row in LOG_RATIOS)
    mask = prefix_mask([len(row) for row in LOG_RATIOS], width)
    ratio = [row + [0.0] * (width - len(row)) for row in LOG_RATIOS]
    old = [
        [round(-chance.uniform(0.02, 2.5) - max(delta, 0.0), 3) for delta in row] for row in ratio
    ]
    logprobs = plus(old, ratio)
    fields = {
        "mask": mask,
        "old_logprobs": old,
        "logprobs": logprobs,
        "sampler_logprobs": plus(old, spread(chance, mask, 0.03, 1.2, 0.25)),
        "reference_logprobs": plus(logprobs, spread(chance, mask, 0.3, 2.0, 0.2)),
        "advantages": over_tokens(ADVANTAGES, mask),
        "sequence_advantages": ADVANTAGES,
        "groups": GROUPS,
        "rewards": REWARDS,
        "named_rewards": NAMED_REWARDS,
        "baselines": [0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5],
        "tokens": [[chance.randrange(1, 4) for _ in row] for row in mask],
    }
    fields.update(fields_about(chance, mask, REWARDS))
    for name in ("sampler_logprobs", "reference_logprobs"):
        fields[name] = [[min(number, -0.001) for number in row] for row in fields[name]]
    return fields


def holes(base):
    """The mixed input with tokens of tools inside, before and at the end of responses."""
    mask = [list(row) for row in base["mask"]]
    for row, place in [(0, 3), (0, 4), (1, 0), (1, 7), (4, 8), (4, 2), (6, 1), (7, 2), (7, 3)]:
        mask[row][place] = 0
    fields = dict(base, mask=mask)
    fields["advantages"] = over_tokens(ADVANTAGES, mask)
    ends = [max(place for place, kept in enumerate(row) if kept) for row in mask]
    fields["final_rewards"] = [
        [reward if place == end else 0.0 for place in range(len(row))]
        for reward, end, row in zip(REWARDS, ends, mask, strict=True)
    ]
    fields["token_rewards"] = [
        [a * kept for a, kept in zip(x, y, strict=True)]
        for x, y in zip(base["token_rewards"], mask, strict=True)
    ]
    return fields


def spans(chance, base):
    """The mixed input with advantages that change sign within a sequence."""
    drawn = draw(chance, base["mask"], -1.5, 1.5)
    advantages = [
        [a * kept for a, kept in zip(x, y, strict=True)]
        for x, y in zip(drawn, base["mask"], strict=True)
    ]
    advantages[0][4] = 0.0
    return dict(base, advantages=advantages)


def three():
    """Three sequences with short log-probabilities, and their terminal rewards."""
    old = [[-0.5, -1, -0.2, -2], [-0.7, -0.1, -1.5, -0.9], [-1.2, -0.4, -0.3, -0.6]]
    ratio = [[0.10, -0.30, 0.25, 0.50], [-0.40, 0.05, 0.35, -0.10], [0.60, -0.20, 0, 0.15]]
    mask = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    values = [[0.1, 0.2, 0.3, 0.4], [0, 0.1, 0.2, 0], [0.5, 0.4, 0, 0]]
    sampler = plus(old, [[0.02, -0.05, 0.3, -0.6], [0.01, 0.04, -0.02, 0.1], [-0.4, 0.03, 0.02, 0]])
    return {
        "mask": mask,
        "old_logprobs": old,
        "logprobs": plus(old, ratio),
        "sampler_logprobs": sampler,
        "reference_logprobs": [[round(a - 0.1, 6) for a in row] for row in old],
        "advantages": over_tokens([1.0, -1.0, 0.5], mask),
        "sequence_advantages": [1.0, -1.0, 0.5],
        "groups": [0, 0, 1],
        "rewards": [1.0, 0.0, 1.0],
        "values": values,
        "old_values": plus(
            values, [[0.3, -0.1, 0.05, 0], [0.2, 0.1, -0.3, 0], [-0.05, 0.25, 0, 0]]
        ),
        "returns": [[0.9, 0.9, 1, 1], [0.1, 0, 0, 0], [1, 1, 0, 0]],
        "entropies": [[1.0, 2.0, 0.5, 1.5], [0.5, 1.0, 0.25, 0], [2.0, 0.75, 0, 0]],
        "final_rewards": [[0, 0, 0, 1.0], [0, 0, 0, 0], [0, 1.0, 0, 0]],
        "token_rewards": [[0.1, -0.1, 0, 1.0], [0, 0.05, -0.2, 0], [0.3, 1.0, 0, 0]],
        "weights": [[1.0, 0.8, 1.5, 0.5], [2.0, 0, 1.0, 1.0], [0.7, 1.2, 1.0, 1.0]],
        "sum_pi_squared": [[0.5, 0.4, 0.8, 0.3], [0.6, 0.9, 0.3, 0.5], [0.4, 0.7, 0.7, 0.5]],
        "tokens": [[5, 6, 7, 8], [5, 6, 1, 0], [5, 2, 0, 0]],
        "baselines": [0.25, 0.25, 0.5],
    }


def four():
    """Four sequences of three tokens in two groups, for advantages."""
    rewards, mask = [1.0, 0.0, 1.0, 0.5], [[1, 1, 1]] * 4
    return {
        "mask": mask,
        "rewards": rewards,
        "groups": [0, 0, 1, 1],
        "final_rewards": [[0.0, 0.0, reward] for reward in rewards],
    }


def ragged(chance):
    """Ten sequences in groups of three, four, one and two, out of order."""
    mask = prefix_mask(RAGGED_LENGTHS, 6)
    fields = {
        "mask": mask,
        "rewards": RAGGED_REWARDS,
        "groups": RAGGED_GROUPS,
        "old_logprobs": draw(chance, mask, -2.5, -0.05),
        "reference_logprobs": draw(chance, mask, -2.5, -0.05),
        "baselines": [0.5, 0.25, 0.5, 0.75, 0.25, 0.25, 0.0, 0.0, 0.5, 0.25],
    }
    fields.update(fields_about(chance, mask, RAGGED_REWARDS))
    return fields


def far():
    """Log-probabilities so far apart that the clamps at 10 and 20 act."""
    gaps = [[-25.0, -12.0, -3.5, -1.0, 0.5, 2.5], [4.0, 9.0, 12.5, 19.5, 21.0, 26.0]]
    old = [[-0.3, -0.7, -1.1, -1.9, -2.2, -3.0], [-5.0, -10.0, -13.0, -20.0, -22.0, -27.0]]
    mask = [[1] * 6, [1] * 6]
    return {
        "mask": mask,
        "old_logprobs": old,
        "logprobs": plus(old, gaps),
        "reference_logprobs": old,
        "sampler_logprobs": plus(old, [[0.1] * 6, [-0.2] * 6]),
        "advantages": over_tokens([0.5, -1.0], mask),
        "sequence_advantages": [0.5, -1.0],
        "entropies": [[0.5] * 6, [1.0] * 6],
    }


def conflicts():
    """Six completions of two groups, with equal tokens at their starts and ends."""
    tokens = [
        [5, 6, 7, 8, 9, 3],
        [5, 6, 1, 8, 9, 3],
        [5, 2, 7, 4, 3, 0],
        [4, 4, 2, 1, 3, 0],
        [4, 1, 2, 1, 3, 0],
        [4, 4, 1, 3, 0, 0],
    ]
    lengths = [6, 6, 5, 5, 5, 4]
    mask = prefix_mask(lengths, 6)
    chance = random.Random(7)
    peaks = [4.0, 5.5, 0.0, 5.0, 3.5, 4.0]
    logits = [
        [
            [round(chance.uniform(-1, 1) + peak * (word == number), 2) for word in range(10)]
            for number in row
        ]
        for row, peak in zip(tokens, peaks, strict=True)
    ]
    return {
        "tokens": tokens,
        "mask": mask,
        "signs": [1, -1, -1, 1, 1, -1],
        "sequence_advantages": [0.75, -0.25, -0.5, 0.3, 0.2, -0.5],
        "rewards": [1.0, 0.0, -0.25, 0.8, 0.7, 0.0],
        "groups": [0, 0, 0, 1, 1, 1],
        "logits": logits,
    }


def pairs():
    """Chosen and rejected sequences: sums of log-probabilities and lengths."""
    return {
        "chosen_logps": [-4.0, -7.5, -2.25, -9.0],
        "rejected_logps": [-5.5, -6.0, -2.5, -14.0],
        "reference_chosen_logps": [-4.5, -7.0, -3.0, -8.0],
        "reference_rejected_logps": [-5.0, -6.5, -2.0, -12.0],
        "chosen_lengths": [4, 6, 3, 8],
        "rejected_lengths": [5, 6, 2, 10],
    }


def logits():
    """Scores over five words for two sequences of three tokens, and kept words."""
    chance = random.Random(11)
    return {
        "logits": [
            [[round(chance.uniform(-2, 2), 3) for _ in range(5)] for _ in range(3)]
            for _ in range(2)
        ],
        "tokens": [[1, 0, 4], [2, 3, 1]],
        "mask": [[1, 1, 1], [1, 1, 0]],
        "keep": [
            [[1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]],
            [[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [0, 1, 0, 1, 0]],
        ],
        "simple_logits": [[[2.0, 1.0, 0.5, -1.0, 0.0]]],
        "simple_tokens": [[1]],
        "simple_keep": [[[1, 1, 1, 0, 0]]],
    }


def make():
    """Every input under its name."""
    chance = random.Random(20261130)
    base = mixed(chance)
    return {
        "three": three(),
        "mixed": base,
        "holes": holes(base),
        "spans": spans(chance, base),
        "four": four(),
        "ragged": ragged(chance),
        "far": far(),
        "conflicts": conflicts(),
        "pairs": pairs(),
        "logits": logits(),
    }


def write(path):
    """One field a line."""
    blocks = []
    for name, fields in make().items():
        lines = ",\n".join(
            f"  {json.dumps(key)}: {json.dumps(field)}" for key, field in fields.items()
        )
        blocks.append(f"{json.dumps(name)}: {{\n{lines}\n}}")
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    write(HERE / "inputs.json")
