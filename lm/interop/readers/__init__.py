"""Checkpoints in: Hugging Face directories, GGUF files, and the folders of this library's training runs."""
