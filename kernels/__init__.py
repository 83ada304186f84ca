"""The hot operations: plain references, and TPU and GPU kernels with the same signatures.

Arrays come in and arrays go out; no parameters, no config. Imports nothing of ours but `errors`.
Start with `reference.py`, the equations of DeepSeek-V3.2's indexer (arXiv 2512.02556):
`indexer_scores` (eq. 1), `select_topk` (eq. 2) and `indexer_kl` (the indexer's KL, eq. 3 and 4).

| operation | files |
|---|---|
| select each query's best keys | selection.py, threshold.py (the search for the k-th best score) |
| attend over the selected keys | sparse_attention.py (TPU), sparse_attention_gpu.py |
| the indexer's KL and its gradients | indexer_kl.py, indexer_kl_kernel.py, indexer_kl_calls.py |
| decode one token | decode_selection.py, sparse_decode.py |
| multiply tokens with their experts | grouped_matmul.py |
| shared | bitmask.py (the selected keys), tiles.py, chunks.py, device.py |

Beside the legend in model/config.py, arrays inside a kernel have the letters Q (queries of a tile),
K (keys of a tile), L (the 128 lanes of a register), n and m (the tiles of an axis).
"""
