"""Ahead of time: what a program costs on TPUs that are not here, from the TPU's own compiler (`certificate`,
`serving`) or by arithmetic (`estimate`), and what to change where it does not fit (`advice`)."""
