"""Experiments on real data."""
