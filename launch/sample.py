r"""Continues a prompt, answers as the assistant of a chat, or fills the gap between two texts.

    python -m launch.sample --workdir=runs/quickstart/sparse --prompt="def add(a, b):"
    python -m launch.sample --workdir=runs/quickstart/sparse --infill \
        --prefix="def add(a, b):\n" --suffix="\n    return c\n"
    python -m launch.sample --workdir=runs/quickstart/reinforce \
        --chat="A zoo has 7 lions. 3 leave. 5 are born. How many lions now?"

A Hugging Face checkpoint chats by its own template. A second --chat goes on from the first answer.
Without a prompt, each line of standard input is the user's next turn, and an empty line begins
another conversation:

    python -m launch.sample --workdir=hf:DIR --chat="What is 17 x 23?"
    python -m launch.sample --workdir=hf:DIR --chat="What is 17 x 23?" \
        --template_options='{"enable_thinking": false}'
    python -m launch.sample --workdir=hf:DIR --system="Answer in one word." \
        --chat="What is the capital of Peru?" --chat="And of Chile?"
    python -m launch.sample --workdir=runs/quickstart/reinforce

Tokens appear as they are sampled. A prefix, suffix or prompt that begins with @ names a file. \n
and \t are read as line end and tab.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax

from data.chat import encode_prompt
from data.decode_stream import DecodeStream
from data.fim import fim_prompt
from data.tokenizer import Tokenizer
from errors import UserError
from experiment.command_line import Flag, command
from experiment.flags import TEMPLATE_OPTIONS
from experiment.schema import Config, with_template_options
from experiment.setup import run_variables, set_up
from rl.engine import Engine
from rl.generate import completion_text, opening
from rl.request import Prompt, keys_of
from train.setup import Setup

LEAST_ROOM = 512  # tokens of a prompt; longer ones have the next power of two

FLAGS = {
    "prompt": Flag("", "text to go on from"),
    "chat": Flag((), "what the user says"),
    "system": Flag("", "what the system says before the user"),
    "infill": Flag(False, "write between --prefix and --suffix"),
    "prefix": Flag("", "of the gap"),
    "suffix": Flag("", "of the gap"),
    "template_options": TEMPLATE_OPTIONS,
}


def run(
    config: Config,
    workdir: Path,
    prompt: str,
    chat: tuple[str, ...],
    system: str,
    infill: bool,
    prefix: str,
    suffix: str,
    template_options: str = "",
) -> None:
    """Prints a completion of what the flags name, or an answer to each line of standard input."""
    if sum(map(bool, (prompt, chat, infill))) > 1:
        raise UserError("give one of --prompt, --chat and --infill")
    if (prefix or suffix) and not infill:
        raise UserError("--prefix and --suffix go with --infill")
    if system and (prompt or infill):
        raise UserError("--system goes with --chat")
    config = with_template_options(config, template_options)
    setup = set_up(config, workdir, rows={}, trains=False)
    tokenizer = setup.tokenizer
    with jax.set_mesh(setup.mesh):
        variables = run_variables(setup, config.init_from, workdir)
        complete = functools.partial(print_completion, Sampler(config, setup, variables))
        if prompt:
            text = text_of(prompt)
            print(text, end="")
            bos = [] if tokenizer.bos is None else [tokenizer.bos]
            complete(bos + tokenizer.encode(text))
        elif infill:
            before, after = text_of(prefix), text_of(suffix)
            print(before, end="")
            complete(fim_prompt(before, after, tokenizer, spm=config.data.infills_spm), end=after)
        else:
            turns = map(text_of, chat) if chat else map(str.strip, sys.stdin)
            converse(complete, turns, text_of(system), tokenizer, config.data.chat_template)


def converse(
    complete: Callable[[list[int]], list[int]],
    turns: Iterable[str],
    system: str,
    tokenizer: Tokenizer,
    template: str,
) -> None:
    """Answers each turn of a user with the conversation so far in sight.

    Args:
      complete: prints a completion of ids, and returns it.
      turns: what the user says; after "" another conversation begins.
      system: what the system says first, "" for nothing.
      template: `data.chat_template`.
    """
    beginning = [{"role": "system", "content": system}] if system else []
    messages, began = [*beginning], opening(tokenizer, template)
    for said in turns:
        if not said:
            messages = [*beginning]
            continue
        messages.append({"role": "user", "content": said})
        answer = complete(encode_prompt(messages, tokenizer, template))
        content = (began + completion_text(answer, tokenizer)).strip()
        messages.append({"role": "assistant", "content": content})


def text_of(argument: str) -> str:
    """Returns the text of an argument, or of the file that it names by @."""
    if not argument.startswith("@"):
        return argument.replace("\\n", "\n").replace("\\t", "\t")
    try:
        return Path(argument[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise UserError(f"{argument[1:]}: cannot read: {failure}") from failure


class Sampler:
    """Samples one completion after another, with one engine as long as prompts fit its slot."""

    def __init__(self, config: Config, setup: Setup, variables: dict):
        self.tokenizer = setup.tokenizer
        self._config, self._setup, self._variables = config, setup, variables
        self._room, self._engine = LEAST_ROOM, None

    def __call__(self, ids: list[int]) -> Iterator[int]:
        """Yields sampled ids until a stop token or sampling.max_new_tokens."""
        if len(ids) > self._room or self._engine is None:
            while len(ids) > self._room:
                self._room *= 2
            sampling = dataclasses.replace(self._config.sampling, max_prompt_tokens=self._room)
            self._engine = Engine(self._setup.model, self._setup.mesh, sampling, rows=1, steps=1)
            self._engine.load(self._variables)
        keys_G2 = keys_of(jax.random.key(self._config.seed), [0], 1)[0]
        stops, most = self.tokenizer.stops, self._config.sampling.max_new_tokens
        for token in self._engine.stream(Prompt(ids, keys_G2, most, stops)):
            if token not in stops:
                yield token


def print_completion(sampler: Sampler, ids: list[int], end: str = "") -> list[int]:
    """Prints a completion of `ids` as it is sampled, then `end`. Returns its tokens."""
    if not ids:
        raise UserError("nothing to go on from: the prompt is empty")
    decoder, sampled = DecodeStream(sampler.tokenizer), []
    for token in sampler(ids):
        print(decoder.push(token), end="", flush=True)
        sampled.append(token)
    print(decoder.flush() + end, flush=True)
    return sampled


if __name__ == "__main__":
    command(run, config="recorded", flags=FLAGS)
