"""From text files, records and tasks to batches of token ids."""
