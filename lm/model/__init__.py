"""The decoder: what it is given (`inputs`), what it gives (`output`), and everything between."""
