"""LoRA adapters in the folders that Hugging Face's PEFT writes, on their way in: onto a checkpoint while it is read."""
