"""A small Llama trained on short rows, for what happens past its length, and books to read that it has not seen."""

from __future__ import annotations

from typing import Any

LENGTH = 128
# Twelve books to measure on, of every kind; the model is trained on the other 54.
READ = (
    *("Genesis", "Joshua", "1 Samuel", "Job", "Psalms", "Proverbs"),
    *("Isaiah", "Ezekiel", "Daniel", "Matthew", "Acts", "Romans"),
)
TRAINED = (
    *("Exodus", "Leviticus", "Numbers", "Deuteronomy", "Judges", "Ruth", "2 Samuel", "1 Kings", "2 Kings"),
    *("1 Chronicles", "2 Chronicles", "Ezra", "Nehemiah", "Esther", "Ecclesiastes", "Song of Solomon", "Jeremiah"),
    *("Lamentations", "Hosea", "Joel", "Amos", "Obadiah", "Jonah", "Micah", "Nahum", "Habakkuk", "Zephaniah"),
    *("Haggai", "Zechariah", "Malachi", "Mark", "Luke", "John", "1 Corinthians", "2 Corinthians", "Galatians"),
    *("Ephesians", "Philippians", "Colossians", "1 Thessalonians", "2 Thessalonians", "1 Timothy", "2 Timothy"),
    *("Titus", "Philemon", "Hebrews", "James", "1 Peter", "2 Peter", "1 John", "2 John", "3 John", "Jude"),
    "Revelation",
)


def books(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"kjv:{name}" for name in names)


def model(length: int = LENGTH) -> dict[str, Any]:
    """1.0 M parameters for rows of `length` tokens."""
    return {
        "vocab_size": 1024,
        "d_model": 128,
        "n_layers": 4,
        "n_heads": 4,
        "d_ff": 344,
        "max_positions": length,
    }


def train(length: int = LENGTH) -> dict[str, Any]:
    """3 M tokens at `length` tokens a row: about three passes over the 54 books."""
    return {
        "steps": 1500,
        "batch": 16,
        "eval_every": 500,
        "save_every": 500,
        "data": {"texts": books(TRAINED), "tokenizer": "bpe:1024", "seq_len": length, "held_out": 0.05},
        "optimizer": {"name": "adamw", "learning_rate": 3e-3},
        "schedule": {"name": "cosine", "warmup": 0.05, "final": 0.1},
    }
