"""Attacks on the promises of docs/promises.md, each with a seed, a count and a report."""
