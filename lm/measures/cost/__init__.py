"""What reading, decoding and training take: time, memory, and the log of a training."""
