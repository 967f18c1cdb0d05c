"""What the models are fed: the Python reference, its sentences, and photographs that scikit-image carries."""

from __future__ import annotations

import re
from importlib import import_module

import numpy as np

from .dinov2 import PIXELS

TOPICS = (
    "objects",
    "types",
    "specialnames",
    "naming",
    "exprs",
    "execmodel",
    "exceptions",
    "typesseq",
    "formatstrings",
    "import",
    "class",
    "function",
    "with",
    "debugger",
)
"""Of ``pydoc_data.topics``, in the order in which the text has them."""
IMAGES = ("astronaut", "camera", "chelsea", "coffee", "retina", "rocket")
"""Of ``skimage.data``: in the public domain (astronaut, rocket) or CC0 (the rest), and part of its wheel."""


def reference_text() -> str:
    """Return chapters of the language reference that comes with this Python; one that it lacks is left out."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in TOPICS if name in topics)


def other_text() -> str:
    """Return the chapters that `reference_text` leaves out, in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics) if name not in TOPICS)


def sentences(text: str, most: int) -> list[str]:
    """Return the first different sentences of the prose in ``text``: 5 to 60 words, from capital to full stop."""
    paragraphs = (" ".join(block.split()) for block in text.split("\n\n") if not block.startswith("    "))
    found = (part for paragraph in paragraphs for part in re.split(r"(?<=\.) (?=[A-Z])", paragraph))
    kept = (part for part in found if re.fullmatch(r"[A-Z][^*:=]*\.", part) and 5 <= len(part.split()) <= 60)
    return list(dict.fromkeys(kept))[:most]


def photographs() -> np.ndarray:
    """Return `IMAGES`, (len, PIXELS, PIXELS, 3) uint8: the square in the middle, resampled bicubically."""
    data, image, operations = (import_module(name) for name in ("skimage.data", "PIL.Image", "PIL.ImageOps"))
    images = (image.fromarray(getattr(data, name)()).convert("RGB") for name in IMAGES)
    fitted = (operations.fit(one, (PIXELS, PIXELS), image.Resampling.BICUBIC) for one in images)
    return np.stack([np.asarray(one) for one in fitted])
