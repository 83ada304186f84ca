"""From problems to completions: prompts, the sampler, and what it wrote as text."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from data.chat import encode_prompt
from data.tasks.problem import Problem
from data.tokenizer import Tokenizer
from model.sharding import batch_sharding
from rl.config import SamplingConfig
from rl.problems import prompt_of
from rl.rollout import Prompts, pad_prompts
from rl.sampler import Completions, sample
from train.setup import Setup, to_host


class Generation(NamedTuple):
    """Completions of P problems, G of each; row p * G + g is the g-th of problem p.

    Attributes:
      prompts_PT, segments_PT: left-padded prompts, on the devices.
      completions: what was sampled, on the devices; B = P * G rows.
      tokens_BC, mask_BC: its tokens and mask, whole on every host.
      truncated_B: bool, whether a completion was cut before its stop token.
      texts: the completions as text, B of them.
    """

    prompts_PT: Array
    segments_PT: Array
    completions: Completions
    tokens_BC: np.ndarray
    mask_BC: np.ndarray
    truncated_B: np.ndarray
    texts: list[str]

    def rows(self, count: int) -> "Generation":
        """Returns what the hosts have of the first `count` rows; the devices' part stays whole."""
        return self._replace(
            tokens_BC=self.tokens_BC[:count],
            mask_BC=self.mask_BC[:count],
            truncated_B=self.truncated_B[:count],
            texts=self.texts[:count],
        )


class Generator:
    """Samples completions of problems, with whatever variables it is given.

    Args:
      template: how prompts are written, `data.chat_template`.
      group_size: G, completions of each problem.
    """

    def __init__(self, setup: Setup, sampling: SamplingConfig, template: str, group_size: int):
        self._setup, self._sampling, self._template = setup, sampling, template
        stops, pad = setup.tokenizer.stops, setup.tokenizer.pad
        self._sample = jax.jit(
            functools.partial(sample, setup.model, sampling, stops, pad, group=group_size)
        )

    def __call__(self, variables: dict, problems: Sequence[Problem], keys_P: Array) -> Generation:
        """Samples the completions of P problems. Each new P is compiled anew.

        Args:
          keys_P: a random key a problem, which alone decides its samples.

        Raises UserError for a prompt longer than sampling.max_prompt_tokens.
        """
        tokenizer, width = self._setup.tokenizer, self._sampling.max_prompt_tokens
        prompts = encode_problems(problems, tokenizer, self._template, width)
        sharding = batch_sharding(self._setup.mesh)
        prompts_PT, segments_PT = (
            jax.device_put(rows, sharding) for rows in (prompts.tokens_PT, prompts.segments_PT)
        )
        completions = self._sample(variables, prompts_PT, segments_PT, keys_P)
        tokens_BC, mask_BC = to_host(completions.tokens_BC), to_host(completions.mask_BC)
        return Generation(
            prompts_PT,
            segments_PT,
            completions,
            tokens_BC,
            mask_BC,
            truncated(tokens_BC, mask_BC, tokenizer.stops),
            completion_texts(tokens_BC, mask_BC, tokenizer, self._template),
        )


def truncated(tokens_BC: np.ndarray, mask_BC: np.ndarray, stops: Sequence[int]) -> np.ndarray:
    """Returns for each completion, which has a token at least, whether its last is no stop [B]."""
    last_B = tokens_BC[np.arange(len(tokens_BC)), mask_BC.sum(axis=1) - 1]
    return ~np.isin(last_B, stops)


def encode_problems(
    problems: Sequence[Problem], tokenizer: Tokenizer, template: str, width: int
) -> Prompts:
    """Writes each problem as a conversation that the assistant is to answer.

    The prompts are padded on the left to `width` tokens.
    """
    ids = [prompt_of(problem, tokenizer, template) for problem in problems]
    return pad_prompts(ids, width, tokenizer.pad)


def completion_texts(
    tokens_BC: np.ndarray, mask_BC: np.ndarray, tokenizer: Tokenizer, template: str
) -> list[str]:
    """Decodes completions, each as `completion_text` does, without the stop token."""
    rows = (
        [int(token) for token in row[mask] if token not in tokenizer.stops]
        for row, mask in zip(tokens_BC, mask_BC, strict=True)
    )
    opening = _opening(tokenizer, template)
    return [opening + tokenizer.decode(row, skip_special_tokens=False) for row in rows]


def completion_text(ids: Sequence[int], tokenizer: Tokenizer, template: str) -> str:
    """Decodes what an assistant wrote, with tags such as <think>.

    Some checkpoints' templates put <think> at the end of the prompt: it then stands at the
    beginning of the text, as if the model had written it.
    """
    return _opening(tokenizer, template) + tokenizer.decode(ids, skip_special_tokens=False)


def _opening(tokenizer: Tokenizer, template: str) -> str:
    cue = encode_prompt([{"role": "user", "content": "?"}], tokenizer, template)
    thinks = tokenizer.decode(cue, skip_special_tokens=False).rstrip().endswith("<think>")
    return "<think>" if thinks else ""
