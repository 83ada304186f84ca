"""From a file to ids, conversations of every form stay as they were."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

import data.encoding
from data.config import TokenizerConfig
from data.pipeline import batches
from data.tokenizer_files import load_tokenizer
from data.tokenizer_training import make_tokenizer
from errors import UserError
from tests.data.reading import take

# Lists of equal length, of unequal length, empty ones and nested ones, numbers of both kinds, and
# fields that only some messages have: all that an array, or a table that wants every row alike,
# would change.
ARGUMENTS = [
    {"x": [1, 2], "y": [3, 4]},
    {"z": [[1.5, 2.0], [3.0, 4.0]]},
    {"z": [[1.0], [], [2.0, 3.0]], "flag": True},
]
CALLS = [{"id": "a", "function": {"name": "f", "arguments": arguments}} for arguments in ARGUMENTS]
RECORDS = [
    {
        "messages": [
            {"role": "developer", "content": f"{number}"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "reasoning_content": "t", "tool_calls": CALLS[: number % 4]},
            {"role": "tool", "name": "f", "content": "3"},
            {"role": "assistant", "content": "a", "spans": [[0, 1], [1, 1]]},
        ],
        "tools": [
            {"name": "f", "parameters": {"x": [1, 2]}},
            {"name": "g", "parameters": {"y": [3, 4]}},
        ],
    }
    for number in range(8)
]


@pytest.fixture(params=["jsonl", "jsonl.gz", "parquet", "arrayrecord"])
def source(request, tmp_path):
    """The source string of RECORDS, in a file of each kind."""
    kind = request.param.partition(".")[0]
    path = tmp_path / f"chats.{request.param}"
    lines = [json.dumps(record).encode() for record in RECORDS]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    elif kind == "arrayrecord":
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for line in lines:
            writer.write(line)
        writer.close()
    else:
        content = b"\n".join(lines)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return f"{kind}:{path}#messages"


@pytest.mark.parametrize("chat", [True, False])
def test_messages_reach_the_template_unchanged(config, checkpoint, monkeypatch, source, chat):
    """They are lists and dicts, as JSON gives them: a template would write an array otherwise."""
    seen = {}

    def encode_and_record(messages, tokenizer, template, tools, *rest):
        seen[messages[0]["content"]] = json.dumps([messages, tools], sort_keys=True)
        return encode(messages, tokenizer, template, tools, *rest)

    encode = data.encoding.encode_chat
    monkeypatch.setattr(data.encoding, "encode_chat", encode_and_record)
    directory = checkpoint("chatml")
    (directory / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message | tojson }}<|im_end|>{% endfor %}"
    )
    settings = config(
        sources=(source,), validation=0.0, chat_template="checkpoint", seq_len=2048, batch_size=1
    )
    tokenizer = load_tokenizer(directory)
    dataset = batches(settings, tokenizer, split="train", seed=0, chat=chat, repeat=False)
    found = take(dataset, 100)
    assert seen == {
        f"{number}": json.dumps([record["messages"], record["tools"]], sort_keys=True)
        for number, record in enumerate(RECORDS)
    }
    assert sum(batch["weights"].sum() for batch in found) > 0


def test_ids_in_a_batch_are_those_of_the_conversation(config, checkpoint, tmp_path):
    """Each segment is a conversation as its template wrote it; the targets are the assistant's."""
    directory = checkpoint("chatml")
    tokenizer = load_tokenizer(directory)
    chats = [
        [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]
        for number in range(9)
    ]
    (tmp_path / "chats.jsonl").write_text(
        "\n".join(json.dumps({"m": messages}) for messages in chats)
    )
    settings = config(
        sources=(f"jsonl:{tmp_path}/chats.jsonl#m",), validation=0.0, chat_template="checkpoint"
    )
    (batch,) = take(batches(settings, tokenizer, split="train", seed=0, chat=True), 1)
    for tokens, segments, weights in zip(
        batch["tokens"], batch["segments"], batch["weights"], strict=True
    ):
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            text = tokenizer.decode(tokens[inside], skip_special_tokens=False)
            number = text.split("user\nq")[1][0]
            turn = f"<think>\n\n</think>\n\na{number}<|im_end|>"
            start = f"<|im_start|>user\nq{number}<|im_end|>\n<|im_start|>assistant\n"
            assert text == f"{start}{turn}\n"
            targets = tokens[inside & (weights > 0)]
            assert tokenizer.decode(targets, skip_special_tokens=False) == turn


def test_turns_that_a_template_cuts_stop_the_run_or_are_counted(
    config, checkpoint, tmp_path, capsys
):
    """The error names the record; by option the other turns are learnt, and a line counts."""
    tokenizer = load_tokenizer(checkpoint("r1", {"eos_token": "<｜end▁of▁sentence｜>"}))
    answers = ["hi", "<think>w</think>hi"]
    lines = [
        json.dumps({"m": [{"role": "user", "content": "q"}, {"role": "assistant", "content": a}]})
        for a in answers * 6
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    changes = {"sources": (f"jsonl:{tmp_path}/chats.jsonl#m",), "validation": 0.0}
    settings = config(chat_template="checkpoint", **changes)
    with pytest.raises(UserError, match=r'chats.jsonl.* message 2 of 2: .* "content" \("w"\)'):
        take(batches(settings, tokenizer, split="train", seed=0, chat=True, repeat=False), 9)
    masked = config(chat_template="checkpoint", incomplete_turns="mask", **changes)
    found = take(batches(masked, tokenizer, split="train", seed=0, chat=True, repeat=False), 9)
    assert sum(batch["weights"].sum() for batch in found) == 6 * len(
        ["hi", "<｜end▁of▁sentence｜>"]
    )
    assert capsys.readouterr().err.count("1 turn is not learnt; ") == 1


def test_a_vocabulary_is_learnt_from_the_texts_of_conversations(config, source):
    settings = config(sources=(source,), validation=0.0)
    assert make_tokenizer(TokenizerConfig("bpe", "", 300), settings).vocab_size >= 268
