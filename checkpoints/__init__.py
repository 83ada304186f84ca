"""Checkpoints on disk: those of training runs, and Hugging Face's.

`training` saves and restores the state of a run with Orbax, `streamed` writes and reads such a
checkpoint without ever having it in memory, `hf` reads and writes Hugging Face's checkpoints, and
`convert` takes one kind into the other. Pytrees of arrays and a ModelConfig come in and go out,
files stay. It may import model, data, files and errors. Start reading with `training`.
"""
