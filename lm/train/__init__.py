"""Training: one jitted step, a loop around it, checkpoints that survive anything, and a log of all of it."""
