"""A trace and options in, a plan out: what becomes of every norm and convolution, and why."""
