"""A network in, a trace out: what feeds each norm and what reads each convolution, shown by one forward pass."""
