"""Least-squares fusion: which member stands for its group, and how much of it each member is (docs/math.md, eq. 9)."""

from __future__ import annotations

import numpy as np


def fusion_gains(
    X: np.ndarray, channels: np.ndarray, y_norms: np.ndarray, group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the channels with each group's sampled member first, and the gain of every member (eq. 9).

    Parameters
    ----------
    X : array, shape (rows, D)
        One block.
    channels : array, shape (D,), int
        From `group_channels`.
    y_norms : array, shape (D,)
        Squared channel lengths of the other side, over the rows that meet this block.
    group_size : int
        G; divides D.

    Returns
    -------
    channels : array, shape (D,), int
        The member with the largest ``|x_j| |y_j|`` comes first (the earliest of equals), the rest in order.
    gains : array, shape (D,)
        ``<x_first, x_j> / <x_first, x_first>``: one for the first member; zero for the others where it is all zero.
    """
    groups = channels.reshape(-1, group_size)
    weights = np.einsum("nd,nd->d", X, X) * y_norms
    first = np.argmax(weights[groups], axis=1)
    # a stable sort by "is not the first" moves one member to the front and keeps the rest in order
    order = np.argsort(np.arange(group_size) != first[:, None], axis=1, kind="stable")
    groups = np.take_along_axis(groups, order, axis=1)
    columns = X[:, groups]
    inner = np.einsum("nr,nrg->rg", columns[:, :, 0], columns)
    length = inner[:, :1]
    gains = np.divide(inner, length, out=np.zeros_like(inner), where=length > 0)
    gains[:, 0] = 1
    return groups.reshape(-1).astype(channels.dtype), gains.reshape(-1)
