"""Hugging Face checkpoints: their files, and how their tensors become ours and back."""
