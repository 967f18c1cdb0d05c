"""Whole pretrained models without a deep-learning framework, their attention replaced; ``distrattn models``.

Importing it needs nothing beyond the package; reading weights, images and drawing need the extra ``models``.
"""

from .cli import main

__all__ = ["main"]
