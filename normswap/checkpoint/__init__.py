"""A converted network in, a folder out, and back: files that are whole whatever interrupts them."""
