"""The definition of every family in naive NumPy: float64, loops over taps, no speed tricks.

`direct` is the convolution itself; each family module computes the same thing in its own way and
fixes the signature of `run` that the other backends follow. All of it also runs on object arrays
(exact fractions, counting scalars), which is how analytic counts are tested.
"""
