"""Speed beside error, against peers in the same run; ``distrattn bench``, see README.md here.

Imports neither CuPy, Numba nor PyTorch: the device and the peers of a run do, when they are used.
"""

from .cli import main

__all__ = ["main"]
