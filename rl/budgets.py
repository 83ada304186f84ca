"""Budgets of thought, as the config asks for them and a tokenizer writes them.

With `sampling.thinking` every completion of a problem keeps to one, in rollouts, greedy baselines
and evaluations alike: a longer thought is cut by a phrase after which it answers (forced
interruption, ScaleRL, arXiv 2510.13786), so that training needs no penalty of length. The phrase is
attended to and never learnt from.
"""

import dataclasses
from collections.abc import Sequence

from data.tokenizer import Tokenizer
from errors import UserError
from rl.config import EvaluateConfig, SamplingConfig
from rl.halting import ThinkingBudget

THINKS = ("think", "r1")  # templates of ours, in which completions begin with a thought
END = "</think>"


@dataclasses.dataclass(frozen=True)
class MarkedText:
    """Reads and writes texts in which the marks of a thought are what the model knows them as.

    A tokenizer's own `encode` makes characters of every mark, as of what a user says.
    """

    tokenizer: Tokenizer

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, its special tokens as such."""
        return self.tokenizer.encode_rendered(text)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def check_thinks(tokenizer: Tokenizer, template: str, field: str, off: str) -> None:
    """Raises UserError for thinking lengths where the chat template writes no thought.

    A checkpoint's own template does where it, or a special token beside it, names `</think>`.

    Args:
      field: that asks for them, with its value.
      off: what turns it off.
    """
    source = tokenizer.chat_template.source if tokenizer.chat_template else ""
    own = END in source or tokenizer.special_token_id(END) is not None
    if template not in THINKS and not (template == "checkpoint" and own):
        raise UserError(
            f'{field}: the chat template "{template}" of this model has no {END}, so there is no '
            f"thought to force; {off}"
        )


def budget_of(tokenizer: Tokenizer, most: int, evaluate: EvaluateConfig) -> ThinkingBudget:
    """Returns the budget of so many tokens of thought that an evaluation has."""
    return ThinkingBudget(
        MarkedText(tokenizer),
        most_tokens=most,
        answer_tokens=evaluate.thinking_answer_tokens,
        stops=tokenizer.stops,
        waits=evaluate.thinking_waits,
    )


def sampling_budget(
    tokenizer: Tokenizer, template: str, sampling: SamplingConfig
) -> ThinkingBudget | None:
    """Returns the budget that completions of problems keep to; None with sampling.thinking = 0.

    Raises UserError where the template has no thought, or thought, phrase and answer do not fit
    sampling.max_new_tokens.
    """
    if not sampling.thinking:
        return None
    field = f"sampling.thinking = {sampling.thinking}"
    check_thinks(tokenizer, template, field, "set it to 0")
    budget = ThinkingBudget(
        MarkedText(tokenizer),
        most_tokens=sampling.thinking,
        answer_tokens=sampling.thinking_answer_tokens,
        stops=tokenizer.stops,
    )
    needed = most_tokens(budget)
    if needed > sampling.max_new_tokens:
        phrase = needed - sampling.thinking - sampling.thinking_answer_tokens
        raise UserError(
            f"sampling.max_new_tokens = {sampling.max_new_tokens}: {field}, the phrase that ends a "
            f"thought, of {phrase} tokens, and sampling.thinking_answer_tokens = "
            f"{sampling.thinking_answer_tokens} take {needed}; raise it to that, or lower these"
        )
    return budget


def most_tokens(budget: ThinkingBudget) -> int:
    """Returns how many tokens a completion with a budget may have, the injected ones included."""
    injected = len(budget.tokenizer.encode(budget.interruption))
    injected += budget.waits * len(budget.tokenizer.encode(budget.wait))
    return budget.most_tokens + injected + budget.answer_tokens
