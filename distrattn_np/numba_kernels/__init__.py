"""Numba CUDA, one module a stem: the second, independent implementation, which also runs in Numba's simulator."""
