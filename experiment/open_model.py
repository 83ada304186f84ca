"""Opens a model outside a command, in a notebook: its config, tokenizer, mesh and parameters."""

from typing import NamedTuple

import jax

from checkpoints.locations import hf_directory, run_directory
from data.tokenizer import Tokenizer
from data.tokenizer_files import load_tokenizer
from experiment.inputs import model_config
from experiment.schema import Config, parse
from experiment.setup import compile_cache, with_vocab_size
from model.sharding import make_mesh
from train.restore import load_variables
from train.setup import Setup


class OpenModel(NamedTuple):
    """A model that is ready to be sampled from: `variables` are {"params", "router"}."""

    config: Config
    setup: Setup
    variables: dict


def open_model(origin: str, *overrides: str) -> OpenModel:
    """Opens the model of a run's workdir, or of `hf:DIR`, a Hugging Face checkpoint.

    Args:
      origin: the workdir, or hf:DIR.
      *overrides: fields of its config, such as "--config.sampling.max_new_tokens=64".

    Raises UserError where there is no such model, or an override is wrong.
    """
    compile_cache()
    config = parse(model_config(origin, overrides))
    tokenizer, mesh = origin_tokenizer(origin), make_mesh(config.mesh)
    model = with_vocab_size(config.model, tokenizer)
    with jax.set_mesh(mesh):
        variables = load_variables(model, mesh, origin)
    return OpenModel(config, Setup(model, tokenizer, mesh), variables)


def origin_tokenizer(origin: str) -> Tokenizer:
    """Loads the tokenizer of a run or a Hugging Face checkpoint."""
    directory = hf_directory(origin) or run_directory(origin)
    return load_tokenizer(directory / "tokenizer.json")
