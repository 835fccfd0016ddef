"""A converted network, its original and images in; the converted network closer to the original out."""
