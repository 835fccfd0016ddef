"""Words in, exit codes out: the verbs of the command line translate what was typed and what came of it."""
