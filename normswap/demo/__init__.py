"""The digits in, a table out: a small real network converted and tuned beside BatchNorm."""
