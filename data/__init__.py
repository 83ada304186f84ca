"""From text files, records and tasks to batches of token ids.

In come the sections `tokenizer` and `data` of a config (`config.py`). Out come a tokenizer
(`tokenizer_training.make_tokenizer`), and batches as a grain dataset with a saveable cursor
(`pipeline.batches`; `packing.py` says what a batch is). Reinforcement learning takes problems
(`tasks/`), prompts (`chat.encode_prompt`) and padded rows (`padding.pad_rows`) from here.

The package imports `errors` and `files` only; everything is numpy on the host, and only `pipeline`,
`bad_records`, `packing`, `stream` and `prefetch` need grain. Start reading with `pipeline.py`,
which lists the steps of a document in order: sources, documents, encoding, packing, prefetch.
"""
