"""Special tokens: those of tokenizers trained here, and the spellings that other families use."""

import re
from collections.abc import Iterable

# Special tokens of a tokenizer trained here, in the order of their ids.
SPECIAL_TOKENS = (
    "<|pad|>", "<|bos|>", "<|eos|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>",
    "<|user|>", "<|assistant|>", "<think>", "</think>", "<answer>", "</answer>",
)  # fmt: skip

# Tags inside a completion: parts of the text a model writes, which decoding therefore keeps.
COMPLETION_TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# Spellings by family, most telling first. In DeepSeek's the document is begin, prefix, hole,
# suffix, end, middle (arXiv 2412.19437, section 4.1).
FIM_SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
BOS_SPELLINGS = ("<|bos|>", "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<bos>", "<s>")
EOS_SPELLINGS = (
    "<|eos|>",
    "<｜end▁of▁sentence｜>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<eos>",
    "</s>",
)
PAD_SPELLINGS = ("<|pad|>", "<｜▁pad▁｜>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]")

_CONTROL = re.compile(r"<[|｜].*[|｜]>")
_KNOWN = {
    *SPECIAL_TOKENS,
    *BOS_SPELLINGS,
    *EOS_SPELLINGS,
    *PAD_SPELLINGS,
    *(token for spelling in FIM_SPELLINGS for token in spelling),
}


def is_control_token(text: str, named: Iterable[str]) -> bool:
    """Returns whether an added token of a tokenizer.json is special though its file may not say so.

    Some files do not flag their control tokens, such as "<｜fim▁hole｜>" in DeepSeek's and
    "<think>" in Qwen's; their spelling gives them away.

    Args:
      text: the token.
      named: texts of the tokens to which a tokenizer_config.json gives a role, such as "bos_token".
    """
    return text in _KNOWN or text in named or _CONTROL.fullmatch(text) is not None
