"""Comparisons, each a program to run by hand."""
