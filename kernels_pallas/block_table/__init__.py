"""Attention to key blocks that are listed per row, head and query block while the program runs; see api.py."""
