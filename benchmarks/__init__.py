"""Benchmarks against other libraries: each is a command that prints a readable table and, last, one JSON object."""
