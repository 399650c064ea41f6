"""What a model chose: experts of tokens, chunks of heads."""
