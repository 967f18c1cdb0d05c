"""The equations of docs/math.md as loops over single numbers, in float64: slow, and written without reference/."""

from __future__ import annotations

import math

import numpy as np

BITS = 16


def hyperplanes(seed: int, L: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal((L, BITS), dtype=np.float32)


def hash_words(X: np.ndarray, planes: np.ndarray) -> list[int]:
    """Eq. 5."""
    words = []
    for j in range(X.shape[1]):
        word = 0
        for p in range(BITS):
            dot = sum(float(X[row, j]) * float(planes[row, p]) for row in range(len(X)))
            word |= (dot > 0) << p
        words.append(word)
    return words


def gray_code(bits: int) -> list[int]:
    """List all words in Gray code order: to add a bit, append the code backwards with that bit set."""
    code = [0]
    for bit in range(bits):
        code += [word | 1 << bit for word in reversed(code)]
    return code


RANK_OF_WORD = {word: rank for rank, word in enumerate(gray_code(BITS))}


def groups_of(words: list[int], G: int) -> list[list[int]]:
    """Eq. 6 and 7."""
    order = sorted(range(len(words)), key=lambda j: (RANK_OF_WORD[words[j]], j))
    return [order[i : i + G] for i in range(0, len(order), G)]


def dot(x: np.ndarray, y: np.ndarray) -> float:
    return sum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def sees(n: int, m: int, offset: int | None) -> bool:
    """Eq. 3."""
    return offset is None or m <= n + offset


def in_window(n: int, m: int, diagonal: int, window: tuple[int | None, int | None]) -> bool:
    """Eq. 23."""
    before, after = n + diagonal - m, m - (n + diagonal)
    return all(side is None or distance <= side for side, distance in zip(window, (before, after), strict=True))


def owns(n: int, m: int, offset: int | None, L: int) -> bool:
    """Eq. 20: whether key m lies in the own block of query n."""
    return offset is not None and math.floor(m / L) == math.floor((n + offset) / L)


def weighted_groups(
    X: np.ndarray, others: list[np.ndarray], groups: list[list[int]], fusion: str
) -> list[tuple[int, dict[int, float]]]:
    """Eq. 8 and 9: the sampled channel of every group, and the gain of each of its members."""
    result = []
    for group in groups:
        if fusion == "sum":
            result.append((group[0], dict.fromkeys(group, 1.0)))
            continue
        weights = [dot(X[:, j], X[:, j]) * sum(float(y[j]) ** 2 for y in others) for j in group]
        first = group[weights.index(max(weights))]
        length = dot(X[:, first], X[:, first])
        gains = {j: dot(X[:, first], X[:, j]) / length if length > 0 else 0.0 for j in group}
        result.append((first, gains | {first: 1.0}))
    return result


def scores(
    q: np.ndarray,
    k: np.ndarray,
    *,
    scale: float,
    offset: int | None,
    G: int,
    L: int,
    by: str,
    fusion: str,
    seed: int,
) -> np.ndarray:
    """Eq. 4 for every pair: (B, H, N, M)."""
    B, H, N, _ = q.shape
    H_kv, M = k.shape[1:3]
    planes = hyperplanes(seed, L)
    S = np.zeros((B, H, N, M))
    for b, h in np.ndindex(B, H):
        h_kv = h * H_kv // H
        sharing = [other for other in range(H) if other * H_kv // H == h_kv]
        X_all, Y_all = (q[b, h], k[b, h_kv]) if by == "queries" else (k[b, h_kv], q[b, h])
        for start in range(0, len(X_all), L):
            block = range(start, min(start + L, len(X_all)))
            X = X_all[block.start : block.stop]
            # the rows on the other side that meet any row of this block
            if by == "queries":
                others = [k[b, h_kv, m] for m in range(M) if any(sees(n, m, offset) for n in block)]
            else:
                others = [q[b, s, n] for s in sharing for n in range(N) if any(sees(n, m, offset) for m in block)]
            maps = weighted_groups(X, others, groups_of(hash_words(X, planes), G), fusion)
            for x, y in np.ndindex(len(X), len(Y_all)):
                score = sum(
                    float(X[x, first]) * sum(gain * float(Y_all[y, j]) for j, gain in gains.items())
                    for first, gains in maps
                )
                n, m = (start + x, y) if by == "queries" else (y, start + x)
                S[b, h, n, m] = scale * score
    return S


def exact_scores(q: np.ndarray, k: np.ndarray, *, scale: float) -> np.ndarray:
    """Eq. 1 for every pair: (B, H, N, M)."""
    B, H, N, _ = q.shape
    H_kv, M = k.shape[1:3]
    S = np.zeros((B, H, N, M))
    for b, h, n, m in np.ndindex(B, H, N, M):
        S[b, h, n, m] = scale * dot(q[b, h, n], k[b, h * H_kv // H, m])
    return S


def attend(
    S: np.ndarray,
    v: np.ndarray,
    *,
    offset: int | None,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    mask: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 2, 3 and 21 to 24, one query at a time, without subtracting a maximum: for scores of ordinary size."""
    B, H, N, M = S.shape
    diagonal = M - N if offset is None else offset
    shown = np.broadcast_to(True if mask is None else mask, S.shape)
    added = np.broadcast_to(0.0 if bias is None else bias, S.shape)

    def final(score: float, extra: float) -> float:
        return (softcap * math.tanh(score / softcap) if softcap > 0 else score) + float(extra)

    H_kv, E = v.shape[1], v.shape[3]
    out, lse = np.zeros((B, H, N, E)), np.full((B, H, N), -math.inf)
    for b, h, n in np.ndindex(B, H, N):
        weights = {
            m: math.exp(final(S[b, h, n, m], added[b, h, n, m]))
            for m in range(M)
            if sees(n, m, offset) and in_window(n, m, diagonal, window) and shown[b, h, n, m]
        }
        total = sum(weights.values())
        if total == 0:
            continue
        lse[b, h, n] = math.log(total)
        for m, weight in weights.items():
            out[b, h, n] += weight / total * v[b, h * H_kv // H, m]
    return out, lse


def sequence_of(row: int, edges: np.ndarray) -> int:
    """Eq. 29."""
    return next(s for s in range(len(edges) - 1) if edges[s] <= row < edges[s + 1])


def ragged_exact(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    edges_q: np.ndarray,
    edges_k: np.ndarray,
    *,
    scale: float,
    causal: bool | str,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 1 to 3, 21, 23 and 29, one packed query at a time: out (N, H, E) and lse (H, N)."""
    N, H, _ = q.shape
    H_kv = k.shape[1]
    out, lse = np.zeros((N, H, v.shape[2])), np.full((H, N), -math.inf)
    for n, h in np.ndindex(N, H):
        s = sequence_of(n, edges_q)
        own_n, rows, keys = n - edges_q[s], edges_q[s + 1] - edges_q[s], edges_k[s + 1] - edges_k[s]
        offset = {False: None, True: keys - rows, "top-left": 0}[causal]
        diagonal = keys - rows if offset is None else offset
        weights = {}
        for m in range(len(k)):
            own_m = m - edges_k[s]
            if sequence_of(m, edges_k) != s or not sees(own_n, own_m, offset):
                continue
            if in_window(own_n, own_m, diagonal, window):
                score = scale * dot(q[n, h], k[m, h * H_kv // H])
                weights[m] = math.exp(softcap * math.tanh(score / softcap) if softcap > 0 else score)
        total = sum(weights.values())
        if total > 0:
            lse[h, n] = math.log(total)
            out[n, h] = sum(weight / total * v[m, h * H_kv // H] for m, weight in weights.items())
    return out, lse


def subspace_block(X: np.ndarray, Y: np.ndarray, rank: int, refine: int) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 13 to 15 from the rows themselves, by least squares: W and Z (D, R) in some basis of their spans."""
    D = X.shape[1]
    chosen: list[int] = []
    for _ in range(rank):
        weights = []
        for j in range(D):
            own = X[:, chosen]
            outside = X[:, j] - own @ np.linalg.lstsq(own, X[:, j], rcond=None)[0]
            weights.append(-1.0 if j in chosen else dot(outside, outside) * dot(Y[:, j], Y[:, j]))
        chosen.append(weights.index(max(weights)))
    W = np.zeros((D, rank))
    for r, j in enumerate(chosen):
        W[j, r] = 1
    Z = np.linalg.lstsq(X @ W, X, rcond=None)[0].T
    for _ in range(refine):
        W = np.linalg.lstsq(Y @ Z, Y, rcond=None)[0].T
        Z = np.linalg.lstsq(X @ W, X, rcond=None)[0].T
    return W, Z


def subspace_scores(
    q: np.ndarray, k: np.ndarray, *, scale: float, offset: int | None, rank: int, refine: int, L: int, by: str
) -> np.ndarray:
    """Eq. 4, 11 to 15 and 20 for every pair, what centring took away added back: (B, H, N, M)."""
    B, H, N, _ = q.shape
    H_kv, M = k.shape[1:3]
    S = np.zeros((B, H, N, M))
    for b, h in np.ndindex(B, H):
        h_kv = h * H_kv // H
        mean = sum(k[b, h_kv]) / M
        K = k[b, h_kv] - mean
        sharing = [other for other in range(H) if other * H_kv // H == h_kv]
        for start in range(0, N if by == "queries" else M, L):
            block = range(start, min(start + L, N if by == "queries" else M))
            if by == "queries":
                X = q[b, h, block.start : block.stop]
                Y = np.array([K[m] for m in range(M) if any(sees(n, m, offset) for n in block)])
            else:
                X = K[block.start : block.stop]
                met = [n for n in range(N) if any(not owns(n, m, offset, L) and sees(n, m, offset) for m in block)]
                Y = np.array([q[b, s, n] for s in sharing for n in met])
            W = Z = np.zeros((q.shape[3], rank))
            if len(Y) > 0:
                W, Z = subspace_block(X, Y, rank, refine)
            for x in block:
                for y in range(M if by == "queries" else N):
                    n, m = (x, y) if by == "queries" else (y, x)
                    row, other = (q[b, h, n], K[m]) if by == "queries" else (K[m], q[b, h, n])
                    score = dot(row, other) if by == "keys" and owns(n, m, offset, L) else dot(row @ W, other @ Z)
                    S[b, h, n, m] = scale * (score + dot(q[b, h, n], mean))
    return S
