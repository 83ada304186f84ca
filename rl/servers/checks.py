"""What must hold before a server samples anything: one line, where it does not."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.tokenizer import Tokenizer
from errors import UserError, shortened
from rl.config import ReinforceConfig, SamplingConfig
from rl.servers.api import Answer, Wanted
from rl.servers.server import Server

# Words, code, numbers, white space, accents, other scripts, a picture of two code points.
TEXTS = (
    "The quick brown fox doesn't jump: 3.14159 + 2,718 = ?\n\n",
    "\tfor i in range(10):\n        x[i] **= 2",
    "Größe, naïve café, Ελληνικά, русский, 日本語, العربية, हिन्दी, 👩‍🔬   \r\n  end",
)
PIECES = 4_096  # ids of the vocabulary whose texts are compared, spread over it
LIKELIEST = 5  # ids whose log-probs tell the temperature


def check_fields(sampling: SamplingConfig, reinforce: ReinforceConfig) -> None:
    """Raises UserError for a field that asks of a server what none does."""
    own = (
        ("top_k", 0, "its log-probs are over the whole vocabulary, of which only a part is drawn"),
        (
            "top_p",
            1.0,
            "its log-probs are over the whole vocabulary, of which only a part is drawn",
        ),
        ("drafts", 0, "the server drafts by options of its own"),
        ("attention_top_p", 1.0, "the server attends as its own options say"),
    )
    for name, wanted, why in own:
        found = getattr(sampling, name)
        if found != wanted:
            raise UserError(f"sampling.{name} = {found}: {why}; set it to {wanted} with a server")
    if reinforce.keep_routing:
        raise UserError(
            "reinforce.keep_routing = True: a server records no experts for the trainer to take; "
            "set it to False with sampling.server"
        )
    if reinforce.sampler_devices:
        raise UserError(
            f"reinforce.sampler_devices = {reinforce.sampler_devices}: a server samples, and these "
            "would do nothing; set it to 0 with sampling.server"
        )
    if reinforce.unfinished == "kept":
        raise UserError(
            "reinforce.unfinished = 'kept': a server's cache is emptied when it gets new weights; "
            "use 'read_again' with sampling.server"
        )


def check_model(server: Server, capacity: int) -> None:
    """Asks a server for its model, whose name requests have.

    Args:
      capacity: tokens that a prompt and its completion may have.

    Raises UserError: it does not answer, or its sequences are shorter.
    """
    found = server.ask("GET", "/v1/models")
    try:
        card = found["data"][0]
        server.model, longest = str(card["id"]), card.get("max_model_len")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UserError(
            f"{server.url}: /v1/models names no model; is this a {server.api.name} server?"
        ) from None
    if longest is not None and longest < capacity:
        raise UserError(
            f"{server.url}: serves sequences of {longest:,} tokens, and sampling.max_prompt_tokens "
            f"+ max_new_tokens are {capacity:,}; start it with room for as many, or lower them"
        )


def check_tokenizer(server: Server, tokenizer: Tokenizer) -> None:
    """Compares the ids of texts and of special tokens with those that a server gives them.

    Raises UserError where one differs.
    """
    regular = [each for each in range(tokenizer.vocab_size) if not tokenizer.is_special(each)]
    special = [each for each in range(tokenizer.vocab_size) if tokenizer.is_special(each)]
    spread = regular[:: max(len(regular) // PIECES, 1)]
    texts_of = {index: tokenizer.decode([index], skip_special_tokens=False) for index in special}
    pieces = " ".join(tokenizer.decode([each]) for each in spread)
    if any(text in pieces for text in texts_of.values() if text):  # which a server takes for an id
        pieces = ""
    compared = [(text, tokenizer.encode(text)) for text in (*TEXTS, pieces) if text]
    compared += [(text, [index]) for index, text in texts_of.items() if text]
    for text, ours in compared:
        theirs = _ids(server, text)
        if theirs != ours:
            place = next(
                (n for n, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b),
                min(len(theirs), len(ours)),
            )
            around = slice(max(place - 2, 0), place + 3)
            raise UserError(
                f"{server.url}: its tokenizer is another than this run's: {shortened(text, 40)!r} "
                f"is {theirs[around]} there at token {place}, {ours[around]} here; serve the "
                "checkpoint that launch.convert exports, with its tokenizer"
            )


def check_logprobs(server: Server, tokenizer: Tokenizer, temperature: float) -> None:
    """Asks for a token, to see that its id and its log-prob come back, at the temperature.

    At a temperature t the difference of two log-probs is 1/t of that at 1. A server that returns
    log-probs from before the temperature is refused: what it drew from is something else.

    Raises UserError.
    """
    prompt = tokenizer.encode("The answer is")
    at_one = _probe(server, prompt, 1.0)
    if temperature in (0.0, 1.0):
        return
    found = _probe(server, prompt, temperature)
    both = sorted(
        at_one.likeliest.keys() & found.likeliest.keys(), key=at_one.likeliest.__getitem__
    )
    if len(both) < 2:
        raise UserError(
            f"{server.url}: tells no log-probs of the likeliest tokens, by which they are seen to "
            "be those at sampling.temperature; allow them, or set it to 1.0"
        )
    plain, tempered = (x[both[-1]] - x[both[0]] for x in (at_one.likeliest, found.likeliest))
    if abs(tempered - plain / temperature) > abs(tempered - plain):
        raise UserError(
            f"{server.url}: its log-probs are not those at sampling.temperature = {temperature:g}, "
            f"with which it draws; start it with {server.api.logprobs_hint}, or set 1.0"
        )


def _ids(server: Server, text: str) -> list[int]:
    asked = {"model": server.model, "prompt": text, "add_special_tokens": False}
    found: Any = server.ask("POST", "/tokenize", asked)
    if not isinstance(found, dict) or not isinstance(found.get("tokens"), list):
        raise UserError(f"{server.url}: /tokenize answers without ids")
    return found["tokens"]


def _probe(server: Server, prompt: Sequence[int], temperature: float) -> Answer:
    wanted = Wanted(prompt, 1, (), temperature, seed=0)
    path, body = server.api.request(server.model, wanted, LIKELIEST)
    try:
        answer = server.api.answer(server.ask("POST", path, body))
    except UserError as error:
        raise server.named(error) from error
    if len(answer.tokens) != 1 or not np.isfinite(answer.logprobs).all():
        raise UserError(f"{server.url}: answers {len(answer.tokens)} tokens where 1 was asked for")
    return answer
