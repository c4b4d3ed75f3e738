"""Kernels in C, compiled for several instruction sets of which the best one here is used."""
