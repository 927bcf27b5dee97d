"""Benchmarks: costs counted in gradients."""
