"""Studies: problems, training, and the claims that they test."""
