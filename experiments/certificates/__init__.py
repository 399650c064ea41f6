"""What a config's step costs on a slice of TPUs, kept and shown."""
