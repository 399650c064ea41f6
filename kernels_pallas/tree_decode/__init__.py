"""Attention of a tree of draft nodes against a long cache. Inference; see api.py."""
