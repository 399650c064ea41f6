"""Data: real texts from installed packages and the user's files, and the tokenizers of checkpoints."""
