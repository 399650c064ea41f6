"""Checkpoints out: Hugging Face directories, PEFT adapters, and folders like those of training runs."""
