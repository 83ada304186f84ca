"""Hugging Face checkpoints become our model config and parameters, and back.

`config` reads and writes config.json with a file of tables for each family (`deepseek`, `qwen3`).
`tensors` is the table of which tensor is which slice of which parameter, `layouts` how the two
differ. `checkpoint` checks the files of a checkpoint against that table, `load` puts them on the
devices. `safetensors` and `safetensors_writer` know the file format, `fp8` the quantisation, and
`metadata` what else a checkpoint has. Start reading with `load`.
"""
