"""Models shared by experiments."""
