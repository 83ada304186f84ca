"""Every experiment starts from `get_config()`, the defaults of all fields as one ConfigDict.

    c = base.get_config()
    c.model.hidden_size = 512

A field is written once, with its default, unit and meaning, in the dataclass of its section:

    tokenizer, data                  data/config.py
    model                            model/config.py
    model.rope .mla .gqa .delta .indexer .moe    model/layer_configs.py
    mesh                             model/mesh.py
    train                            train/config.py
    sampling, reinforce, evaluate    rl/config.py
    seed, init_from                  experiment/schema.py

Fields of the model have the names of Hugging Face's config.json wherever it has a key for them.
`python -m launch.fields` prints them all, or those of one section.
"""

from typing import Any

from experiment.schema import default_config


def get_config() -> Any:
    """Returns the defaults of every field, a ConfigDict: type checkers cannot know its fields."""
    return default_config()
