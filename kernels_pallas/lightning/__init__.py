"""Chunked linear attention with a decay per head, state in and out, forward and backward; see api.py."""
