"""The two public calls: check the arguments, choose a backend, run it."""

from __future__ import annotations

from typing import Any

from . import backends, checks
from .problem import Grouping


def distr_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    method: str = "lsh",
    fusion: str = "sum",
    group_size: int = 2,
    group_by: str | None = None,
    block_size: int | None = None,
    seed: int = 0,
    causal: bool | str = False,
    scale: float | None = None,
    layout: str = "bhnd",
    out: Any = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention over all keys, with scores computed from groups of similar channels.

    Block by block, channels of the query/key width that point the same way are grouped by locality-sensitive hashing.
    One channel of each group is sampled on the side that is cut into blocks, the group is added up on the other, and
    the score product runs over ``D / group_size`` channels. Softmax and the product with ``v`` are exact. Equal to
    exact attention for ``group_size=1``, and where the channels of every group are equal.

    Parameters
    ----------
    q : array, shape (B, H, N, D), float16 | bfloat16 | float32 | float64
        Queries: a NumPy, CuPy or Numba device array. The last axis must be contiguous; any other strides are used as
        they are. D is 1 to 256.
    k : array, shape (B, H_kv, M, D), dtype and kind of ``q``
        Keys. H_kv divides H: query head h uses key head ``h * H_kv // H``.
    v : array, shape (B, H_kv, M, E), dtype and kind of ``q``
        Values. E is 1 to 256.
    method : {"lsh"}
        How channels are grouped: "lsh" is the paper's hashing.
    fusion : {"sum", "lstsq"}
        "sum" (the paper) samples the first channel of a group and adds up its members; "lstsq" samples the channel that
        weighs most and adds the members up with their least-squares gains.
    group_size : int
        G, channels per group; must divide D. 1 is exact attention.
    group_by : {"queries", "keys"}, optional
        Which side is cut into blocks. Default: "queries" (the paper).
    block_size : int, optional
        L, rows per block. Default: 1024.
    seed : int
        Seeds the hyperplanes of the hash; the same seed gives the same groups on every backend.
    causal : bool or {"bottom-right", "top-left"}
        True and "bottom-right": query n sees keys ``m <= n + M - N``. "top-left": keys ``m <= n``.
    scale : float, optional
        Multiplies the scores. Default: ``1 / sqrt(D)``.
    layout : {"bhnd", "bnhd"}
        Order of the axes of q, k, v and the result; "bnhd" is (B, N, H, D).
    out : array, optional
        Written and returned. Shape, dtype, kind and device of the result; must not overlap the inputs.
    return_lse : bool
        Also return the log-sum-exp of the scaled scores of each row.
    backend : {"numpy", "cupy", "numba"}, optional
        Default: the one of the arrays' kind. NumPy arrays given to a GPU backend are copied there and back.

    Returns
    -------
    out : array, shape (B, H, N, E) in ``layout``, dtype, kind and device of ``q``
        Every row lies between the least and the greatest visible value of each column of ``v``. A query that sees no
        key gives zero.
    lse : array, shape (B, H, N), float32
        Only with ``return_lse``. Natural logarithm; minus infinity for a query that sees no key.

    Raises
    ------
    TypeError
        If an array is of another kind or dtype than ``q``, or of none that is supported.
    ValueError
        If shapes, strides or options break one of the rules above; the text names the argument.
    ImportError
        If the backend's package is not installed; the text says what to install.

    Notes
    -----
    Equation (4) of docs/math.md; after [1]_, whose grouping this is with ``method="lsh", fusion="sum",
    group_by="queries"``. 16-bit inputs are multiplied on tensor cores with float32 accumulation; the softmax is float32
    (float64 for float64). With ``causal`` the groups of a block depend on all of its rows, so the result for row n
    depends on later rows of its own block through them, though it never uses their values. The quality on a model that
    was not trained with it is measured in docs/accuracy.md; no bound is promised.

    References
    ----------
    .. [1] Jin et al., "DistrAttention", arXiv:2507.17245.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 2, 64, 32), dtype=np.float32)
    >>> distr_attention(q, k, v, group_size=2).shape
    (1, 2, 64, 32)
    """
    grouping = checks.check_grouping(
        q,
        method=method,
        fusion=fusion,
        group_size=group_size,
        group_by=group_by,
        block_size=block_size,
        seed=seed,
    )
    return _attend(q, k, v, grouping, causal, scale, layout, out, return_lse, backend)


def exact_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool | str = False,
    scale: float | None = None,
    layout: str = "bhnd",
    out: Any = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Exact attention ``softmax(scale q k^T) v``: what `distr_attention` gives for ``group_size=1``.

    Parameters, results and errors are those of `distr_attention` without the grouping options; equations (1) to (3) of
    docs/math.md.

    Examples
    --------
    >>> import numpy as np
    >>> one = np.ones((1, 1, 2, 4), dtype=np.float32)
    >>> exact_attention(one, one, one)[0, 0, 0]
    array([1., 1., 1., 1.], dtype=float32)
    """
    return _attend(q, k, v, None, causal, scale, layout, out, return_lse, backend)


def _attend(
    q: Any,
    k: Any,
    v: Any,
    grouping: Grouping | None,
    causal: bool | str,
    scale: float | None,
    layout: str,
    out: Any,
    return_lse: bool,
    backend: str | None,
) -> Any:
    checks.check_backend_name(backend)
    problem = checks.check_attention(q, k, v, causal=causal, scale=scale, layout=layout, out=out, grouping=grouping)
    result, lse = backends.load(backend, like=q).attention(problem, q, k, v, out)
    return (result, lse) if return_lse else result
