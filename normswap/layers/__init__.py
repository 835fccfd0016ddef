"""What a converted network is made of, and the tensor maths behind it."""
