"""Benchmarks, to be run manually."""
