"""Keys of config.json that are moved, dropped or added: those that mean the same, those that mean
something else, and those that are refused.
"""

import contextlib
import json

import pytest

from checkpoints.hf.config import model_fields
from checkpoints.hf.safetensors import TensorFiles
from errors import UserError
from tests.model.golden import GOLDEN


def fields(case: str, tmp_path, change) -> dict:
    """The fields that a golden case's config.json has after a change of its keys."""
    keys = json.loads((GOLDEN / case / "config.json").read_text())
    change(keys)
    (tmp_path / "config.json").write_text(json.dumps(keys))
    return model_fields(tmp_path, TensorFiles(GOLDEN / case).tensors)


def moved_rope(keys):
    """Moves the rope keys to where the releases have them."""
    rope = keys.pop("rope_parameters")
    keys["rope_theta"] = rope.pop("rope_theta")
    keys["partial_rotary_factor"] = rope.pop("partial_rotary_factor", None)
    rope["type"] = rope.pop("rope_type")
    keys["rope_scaling"] = rope if rope["type"] != "default" else None


def interval(keys):
    """Drops the kinds of layers, as Qwen3-Next's release does: every fourth is full attention."""
    del keys["layer_types"]


def no_factor(keys):
    """Drops YaRN's factor: transformers then takes the ratio of the two contexts."""
    rope = keys["rope_parameters"]
    keys["max_position_embeddings"] = int(
        rope.pop("factor") * rope["original_max_position_embeddings"]
    )


def context_beside(keys):
    keys["original_max_position_embeddings"] = keys["rope_parameters"].pop(
        "original_max_position_embeddings"
    )


def context_default(keys):
    keys["max_position_embeddings"] = keys["rope_parameters"].pop(
        "original_max_position_embeddings"
    )


SAME = {
    "rope where the releases have it, V3": ("deepseek_v3", moved_rope),
    "rope where the releases have it, Next": ("qwen3_next", moved_rope),
    "rope where the releases have it, Qwen3": ("qwen3", moved_rope),
    "the interval's default": ("qwen3_next", interval),
    "the interval": (
        "qwen3_next",
        lambda keys: (interval(keys), keys.update(full_attention_interval=4)),
    ),
    "no factor": ("deepseek_v3", no_factor),
    "the old context beside": ("deepseek_v3", context_beside),
    "the old context by default": ("deepseek_v3", context_default),
    "dense layers by kind": ("deepseek_v32", lambda keys: keys.update(first_k_dense_replace=0)),
    "dense layers by number": ("deepseek_v32", lambda keys: keys.pop("mlp_layer_types")),
    "model_type alone": ("deepseek_v32", lambda keys: keys.pop("architectures")),
    "both ropes": (
        "qwen3",
        lambda keys: keys.update(
            rope_scaling=keys["rope_parameters"],
            rope_parameters={"rope_type": "default", "rope_theta": 7.0},
        ),
    ),
    "experts by a third name": (
        "deepseek_v32",
        lambda keys: keys.update(num_experts=keys.pop("n_routed_experts")),
    ),
    "gates normed by default in Next": ("qwen3_next", lambda keys: keys.pop("norm_topk_prob")),
    "experts by the other name": (
        "qwen3_moe",
        lambda keys: keys.update(num_experts=keys.pop("num_local_experts")),
    ),
}


@pytest.mark.parametrize("what", SAME)
def test_the_same_in_other_words(what, tmp_path):
    case, change = SAME[what]
    assert fields(case, tmp_path, change) == fields(case, tmp_path, lambda keys: None)


OTHER = {
    "every second layer": (
        "qwen3_next",
        lambda keys: (interval(keys), keys.update(full_attention_interval=2)),
        "layer_types",
        ("delta", "gqa"),
    ),
    "the default head of Qwen3": ("qwen3", lambda keys: keys.pop("head_dim"), "gqa.head_dim", 128),
    "the default head of Qwen3-Next": (
        "qwen3_next",
        lambda keys: keys.pop("head_dim"),
        "gqa.head_dim",
        256,
    ),
    "a quarter of it turned by default": (
        "qwen3_next",
        lambda keys: keys["rope_parameters"].pop("partial_rotary_factor"),
        "gqa.rotary_dim",
        4,
    ),
    "the head of Qwen3-MoE": (
        "qwen3_moe",
        lambda keys: keys.update(head_dim=None, hidden_size=48),
        "gqa.head_dim",
        8,
    ),
    "a ramp of parts of channels": (
        "qwen3",
        lambda keys: keys["rope_parameters"].update(truncate=False),
        "rope.truncate",
        False,
    ),
    "a magnitude given": (
        "qwen3",
        lambda keys: keys["rope_parameters"].update(attention_factor=1.5),
        "rope.attention_factor",
        1.5,
    ),
    "dense by kind": (
        "deepseek_v32",
        lambda keys: keys.update(mlp_layer_types=["sparse", "dense", "sparse"]),
        "mlp_only_layers",
        (1,),
    ),
    "gates not normed by default in Qwen3-MoE": (
        "qwen3_moe",
        lambda keys: keys.pop("norm_topk_prob"),
        "moe.norm_topk_prob",
        False,
    ),
    "as many key heads as heads": (
        "qwen3",
        lambda keys: keys.update(num_key_value_heads=None),
        "gqa.num_key_value_heads",
        4,
    ),
    "a step over layers": (
        "qwen3_moe",
        lambda keys: keys.update(decoder_sparse_step=3),
        "mlp_only_layers",
        (3,),
    ),
}


@pytest.mark.parametrize("what", OTHER)
def test_what_a_key_means(what, tmp_path):
    case, change, field, expected = OTHER[what]
    assert fields(case, tmp_path, change)[field] == expected


def test_a_value_of_another_type_is_one_line(tmp_path):
    for key, value in {
        "num_hidden_layers": "3",
        "hidden_size": 4.5,
        "tie_word_embeddings": 1,
        "rope_parameters": "yarn",
        "architectures": "Qwen3",
    }.items():
        with pytest.raises(UserError, match=f'"{key}": .*must be'):
            fields("qwen3", tmp_path, lambda keys, key=key, value=value: keys.update({key: value}))


DEFAULTS = json.loads((GOLDEN / "defaults.json").read_text())
MODEL_TYPES = {
    "deepseek_v3": "deepseek_v3",
    "deepseek_v3_released": "deepseek_v3",
    "deepseek_v32": "deepseek_v32",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "qwen3_moe_step": "qwen3_moe",
    "qwen3_next": "qwen3_next",
}


@pytest.mark.parametrize("case", MODEL_TYPES)
def test_a_missing_key_is_what_transformers_takes_for_it_or_refused(case, tmp_path):
    """Many of these values no shape betrays: groups, the scale of the gates, which are normed."""
    taken = set()
    for key, default in DEFAULTS[MODEL_TYPES[case]].items():
        expected = None
        with contextlib.suppress(UserError):  # the default may not go with the other keys
            expected = fields(case, tmp_path, lambda keys, k=key, v=default: keys.update({k: v}))
        try:
            found = fields(case, tmp_path, lambda keys, key=key: keys.pop(key, None))
        except UserError as error:
            assert f'no key "{key}"' in str(error)
            continue
        assert found == expected, key
        taken.add(key)
    assert len(taken) > 15
    if MODEL_TYPES[case].startswith("deepseek"):
        assert taken >= {"n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob"}


@pytest.mark.parametrize(
    "case, key, field, value",
    [
        ("deepseek_v3", "norm_topk_prob", "moe.norm_topk_prob", False),
        ("deepseek_v3", "rope_interleave", "rope.rope_interleave", False),
        ("deepseek_v3", "q_lora_rank", "mla.q_lora_rank", 0),
        ("deepseek_v3", "n_group", None, '"n_group": null: must be a whole number'),
        ("deepseek_v3", "routed_scaling_factor", None, '"routed_scaling_factor": null: must be a'),
        ("qwen3", "head_dim", None, '"head_dim": null: must be a whole number'),
        ("qwen3", "rms_norm_eps", None, '"rms_norm_eps": null: must be a number'),
    ],
)
def test_null_is_false_or_none_and_no_default(case, key, field, value, tmp_path):
    """In transformers a null is Python's None, not a key that is missing."""

    def change(keys):
        keys[key] = None

    if field is not None:
        assert fields(case, tmp_path, change)[field] == value
        return
    with pytest.raises(UserError) as error:
        fields(case, tmp_path, change)
    assert value in str(error.value)


@pytest.mark.parametrize(
    "case, stated",
    [
        ("qwen3_moe", {"use_qk_norm": True, "shared_expert_intermediate_size": 0}),
        ("qwen3_moe", {"qkv_bias": False, "mlp_bias": False, "use_bias": False}),
        ("qwen3", {"use_qk_norm": True, "use_rope": True}),
        ("qwen3_next", {"attn_output_gate": True, "qk_norm": True}),
        ("deepseek_v3", {"mlp_bias": False, "use_rope": True}),
    ],
)
def test_a_key_may_state_what_is_done_anyway(case, stated, tmp_path):
    """As Qwen3-Coder-480B's does. The other value would be another model, and is refused."""
    plain = fields(case, tmp_path, lambda keys: None)
    assert fields(case, tmp_path, lambda keys: keys.update(stated)) == plain
    for key, value in stated.items():
        other = 64 if key == "shared_expert_intermediate_size" else not value
        with pytest.raises(UserError, match=f'"{key}": .*: only {json.dumps(value)} is supported'):
            fields(case, tmp_path, lambda keys, key=key, other=other: keys.update({key: other}))


REFUSED = {
    "YaRN's magnitude by a key that readers take differently": (
        "qwen3",
        lambda keys: keys["rope_parameters"].update(factor=4.0, attn_factor=0.8782488562869419),
        'takes 1.13863, vLLM takes 1; write the one that is meant as "attention_factor"',
    ),
    "another key of YaRN": (
        "qwen3",
        lambda keys: keys["rope_parameters"].update(ext_factor=1.0),
        '"ext_factor": 1.0: not a key of rope_type yarn that is supported (these are: attention_',
    ),
    "GLM-5": (
        "deepseek_v32",
        lambda keys: keys.update(architectures=["GlmMoeDsaForCausalLM"]),
        "not supported (it is a DeepseekV32ForCausalLM but for these: the indexer rotates pairs",
    ),
    "blocks of no shape": (
        "deepseek_v3",
        lambda keys: keys.update(quantization_config={"weight_block_size": ["a", 0]}),
        "\"weight_block_size\": ['a', 0]: must be two whole numbers",
    ),
    "no key heads": (
        "qwen3_moe",
        lambda keys: keys.pop("num_key_value_heads"),
        'no key "num_key_value_heads"',
    ),
    "no heads": (
        "qwen3",
        lambda keys: keys.update(num_attention_heads=0),
        '"num_attention_heads": 0: must be positive',
    ),
    "half a channel": (
        "qwen3",
        lambda keys: keys.update(head_dim=14.5),
        '"head_dim": 14.5: must be a whole number',
    ),
    "V3.2 with halves": (
        "deepseek_v32",
        lambda keys: keys.update(rope_interleave=False),
        '"rope_interleave": false: only true',
    ),
    "V3.2's indexer with pairs": (
        "deepseek_v32",
        lambda keys: keys.update(indexer_rope_interleave=True),
        '"indexer_rope_interleave": true: only false',
    ),
    "a part of a head turned": (
        "qwen3",
        lambda keys: keys.update(partial_rotary_factor=0.5),
        '"partial_rotary_factor": 0.5',
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_meant_is_one_line(what, tmp_path):
    case, change, words = REFUSED[what]
    with pytest.raises(UserError) as error:
        fields(case, tmp_path, change)
    assert words in str(error.value)
