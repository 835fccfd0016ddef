"""A plan in, a checked network out: the one place where a model changes."""
