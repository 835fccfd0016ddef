"""Names, files and hubs in, networks and tensors out: all that comes from outside passes here and is not trusted."""
