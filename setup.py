"""Folder map only; everything else is in pyproject.toml.

``raw_kernels/`` and ``reference/`` stand at the top of the tree and install inside the package, so that no generic
top-level name lands in a user's site-packages.
"""

from setuptools import setup

setup(
    packages=[
        "distrattn_np",
        "distrattn_np.backends",
        "distrattn_np.bench",
        "distrattn_np.bench.approximations",
        "distrattn_np.bench.models",
        "distrattn_np.data",
        "distrattn_np.numba_kernels",
        "distrattn_np.raw_kernels",
        "distrattn_np.reference",
    ],
    package_dir={
        "distrattn_np.raw_kernels": "raw_kernels",
        "distrattn_np.reference": "reference",
        "distrattn_np.bench": "bench",
    },
)
