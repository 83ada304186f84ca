"""What a model writes in the gaps of held-out documents, to be read by a person."""

import dataclasses
import itertools
from collections.abc import Iterable

import jax
import numpy as np

from data.config import DataConfig
from data.fim import fim_prompt
from data.shuffled_texts import infill_documents
from data.tokenizer import Tokenizer
from rl.config import SamplingConfig
from rl.engine import Engine
from rl.request import Prompt, keys_of
from train.evaluate import INFILL_BYTES_PER_TOKEN
from train.infill import WORD_END
from train.setup import Setup

GAPS = 4  # in all sources together
TRIED = 500  # texts of a source that are looked at: those with few words or many tokens do not fit
WORDS = 8  # of a gap at most
NEW_TOKENS = 48  # that the model may write in a gap


def infill_samples(
    setup: Setup, variables: dict, data: DataConfig, sampling: SamplingConfig, stage: str
) -> list[dict[str, str]]:
    """Returns gaps of the first held-out documents, and what the model most likely writes there.

    They are the same gaps for each model, of the sources that infilling applies to in turn.

    Args:
      sampling: of what is sampled otherwise; here it is greedy.
      stage: "dense" or "sparse" attention.

    Returns:
      Records {"source", "document", "prefix", "middle", "suffix", "completion"}.
    """
    tokenizer = setup.tokenizer
    width = data.seq_len - NEW_TOKENS
    longest = INFILL_BYTES_PER_TOKEN * data.seq_len
    sources = infill_documents(data, "validation", longest)
    each = -(-GAPS // len(sources))
    gaps = [
        {"source": source, **gap}
        for source, texts in sources.items()
        for gap in find_gaps(texts, tokenizer, width, each, spm=data.infills_spm)
    ][:GAPS]
    if not gaps:
        return []
    prompts = [infill_prompt(gap, tokenizer, spm=data.infills_spm) for gap in gaps]
    greedy = dataclasses.replace(
        sampling,
        temperature=0.0,
        max_prompt_tokens=width,
        max_new_tokens=NEW_TOKENS,
        attention="sparse" if stage == "sparse" else "dense",
    )
    engine = Engine(setup.model, setup.mesh, greedy, rows=len(prompts), pad=tokenizer.pad)
    keys_PG2 = keys_of(jax.random.key(0), range(len(prompts)), 1)  # greedy: they do not matter
    with engine.loaded(variables):
        found = engine.run(
            Prompt(ids, keys_G2, NEW_TOKENS, tokenizer.stops, group=number)
            for number, (ids, keys_G2) in enumerate(zip(prompts, keys_PG2, strict=True))
        )
        completions = {each.group: each.completion for each in found}
    texts = [
        tokenizer.decode([token for token in completions[number] if token not in tokenizer.stops])
        for number in range(len(prompts))
    ]
    return [{**gap, "completion": text} for gap, text in zip(gaps, texts, strict=True)]


def find_gaps(
    texts: Iterable[tuple[str, str]], tokenizer: Tokenizer, width: int, count: int, *, spm: bool
) -> list[dict[str, str]]:
    """Returns a gap of a few words in each of the first `count` texts that fit in a prompt.

    Args:
      texts: (name, text) of documents, of which the first TRIED are looked at.
      width: tokens of the longest prompt.
      spm: writes the suffix first.

    Returns:
      Records {"document", "prefix", "middle", "suffix"}.
    """
    rng = np.random.default_rng(0)
    gaps = []
    for name, text in itertools.islice(texts, TRIED):
        ends = [match.start() for match in WORD_END.finditer(text)]
        if len(ends) <= 2 * WORDS:
            continue
        first = int(rng.integers(WORDS, len(ends) - WORDS))
        begin, end = ends[first], ends[first + int(rng.integers(2, WORDS))]
        gap = {"prefix": text[:begin], "middle": text[begin:end], "suffix": text[end:]}
        if len(infill_prompt(gap, tokenizer, spm=spm)) > width:
            continue
        gaps.append({"document": name, **gap})
        if len(gaps) == count:
            break
    return gaps


def infill_prompt(gap: dict[str, str], tokenizer: Tokenizer, *, spm: bool) -> list[int]:
    """Returns the tokens that the model reads before it writes a gap's middle."""
    return fim_prompt(gap["prefix"], gap["suffix"], tokenizer, spm=spm)
