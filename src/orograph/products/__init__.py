"""Products of curvature matrices with vectors: one file per engine."""
