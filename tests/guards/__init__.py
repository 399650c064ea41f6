"""What a rebuilding of the code must leave as it was: see `tests.guards.programs` and ``tests/test_guards.py``."""
