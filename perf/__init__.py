"""Benchmarks and tools that look at the kernels: what they compute, what they move, how long they take."""
