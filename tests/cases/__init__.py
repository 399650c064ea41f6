"""The generic suites: what every plug of a socket owes, as classes that its test file subclasses in a few lines."""
