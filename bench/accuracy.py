"""How far every method is from exact attention on real q, k, v: ``python -m distrattn_np.bench.accuracy``.

Prints the Markdown table that stands between the marks of docs/accuracy.md, or writes it there. Everything is computed
by reference/ in float64, so the errors are the methods' own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import checks, demo, reference
from ..problem import Grouping, Problem, Subspace, block_edges
from ..work import visible_pairs
from .models.methods import rows_met
from .oracle import rows_of_block

BEGIN, END = "<!-- accuracy:begin -->\n", "<!-- accuracy:end -->"
BEST = "best linear map (SVD)"
RANK_SHARES = (0.25, 0.5, 0.75)
SCORE_TOLERANCES = (0.3, 0.1)
HEADINGS = ("method", "blocks", "R", "output error", "total variation", "score error", "predicted / measured")


Rows = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the table. Errors are means over heads, score errors root mean squares over blocks, in nats."""

    label: str
    blocks: str
    mean_rank: float
    output_error: float
    total_variation: float
    score_error: float
    predicted: float | None


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m distrattn_np.bench.accuracy", description=__doc__)
    parser.add_argument("--input", type=Path, metavar="FILE.npz", help="your own q, k, v, as for distrattn demo")
    parser.add_argument("--block-size", type=int, metavar="L", help="default: what each method has by default")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="write the table between the marks of this file")
    options = parser.parse_args(argv)
    inputs = demo.load_sample() if options.input is None else demo.load_file(options.input)
    lines = []
    for measured in measure(inputs, options.block_size):
        print(measured.label, measured.blocks, f"{measured.output_error:.3f}", file=sys.stderr)
        lines.append(measured)
    table = markdown(lines)
    if options.write is None:
        print(table)
        return 0
    text = options.write.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"--write: must hold {BEGIN.strip()} and {END}, got {options.write}")
    options.write.write_text(f"{before}{BEGIN}{table}\n{END}{after}", encoding="utf-8")
    return 0


def measure(inputs: demo.Inputs, block_size: int | None) -> Iterator[Measured]:
    """Yield the lines of the table: the paper's grouping, then every rank and tolerance by keys and by queries."""
    for fusion in ("sum", "lstsq"):
        yield _measure(inputs, f"lsh {fusion}", {"method": "lsh", "fusion": fusion, "block_size": block_size})
    D = inputs.q.shape[3]
    for by in ("keys", "queries"):
        common = {"method": "subspace", "group_by": by, "block_size": block_size}
        for share in RANK_SHARES:
            chosen = common | {"rank": int(share * D)}
            for refine in (0, 1, 3):
                yield _measure(inputs, f"subspace, refine={refine}", chosen | {"refine": refine})
            yield _measure(inputs, BEST, chosen)
        for score_tol in SCORE_TOLERANCES:
            yield _measure(inputs, f"subspace, score_tol={score_tol}", common | {"score_tol": score_tol})


def _measure(inputs: demo.Inputs, label: str, options: dict[str, Any]) -> Measured:
    problem = checks.check_attention(
        inputs.q,
        inputs.k,
        inputs.v,
        causal=inputs.causal,
        scale=inputs.scale,
        layout="bhnd",
        out=None,
        grouping=checks.check_grouping(inputs.q, **options),
    )
    grouping, maps = problem.grouping, demo.head_maps(inputs, problem)
    if grouping is None or maps is None:
        raise ValueError(f"{label}: must save a channel, got {options}")
    if label == BEST and isinstance(maps, reference.Maps):
        replace_by_best(maps, inputs, problem, grouping)
    seen = reference.visible_keys(problem.queries, problem.keys, problem.causal_offset)
    output_errors, total_variations, squares = [], [], []
    for b, h in np.ndindex(problem.batch, problem.heads):
        h_kv = h // problem.heads_per_kv_head
        Q, K, V = (x.astype(np.float64) for x in (inputs.q[b, h], inputs.k[b, h_kv], inputs.v[b, h_kv]))
        S, exact_S = approximate_scores(problem, grouping, maps, Q, K, b, h), problem.scale * (Q @ K.T)
        squares.append(np.square(S - exact_S)[seen].mean())
        P, exact_P = (_softmax(np.where(seen, x, -np.inf)) for x in (S, exact_S))
        output_errors.append(np.linalg.norm(P @ V - exact_P @ V) / np.linalg.norm(exact_P @ V))
        total_variations.append(0.5 * np.abs(P - exact_P).sum(axis=1).mean())
    by_blocks = maps if isinstance(maps, reference.Maps) else None
    return Measured(
        label=label,
        blocks=f"{grouping.block_size} {grouping.by}",
        mean_rank=problem.rank if by_blocks is None else by_blocks.ranks[:, :, np.array(rows_met(problem)) > 0].mean(),
        output_error=float(np.mean(output_errors)),
        total_variation=float(np.mean(total_variations)),
        score_error=float(np.sqrt(np.mean(squares))),
        predicted=None if by_blocks is None else _predicted_error(problem, grouping, by_blocks),
    )


def approximate_scores(
    problem: Problem, grouping: Grouping | Subspace, maps: Any, Q: Rows, K: Rows, b: int, h: int
) -> Rows:
    """Return the scores of one head (N, M) after ``scale``, with what centring took away added back."""
    h_kv = h // problem.heads_per_kv_head
    h_x = h_kv if grouping.by == "keys" else h
    sizes: dict[str, Any] = {"block_size": grouping.block_size, "group_by": grouping.by}
    if isinstance(grouping, Grouping):
        channels, gains = maps
        own_gains = None if gains is None else gains[b, h_x]
        return problem.scale * reference.fused_scores(
            Q, K, channels[b, h_x], own_gains, group_size=grouping.group_size, **sizes
        )
    mean = maps.key_mean[b, h_kv]
    if problem.causal_offset is not None and grouping.by == "keys":
        sizes["exact_from"] = reference.own_block_begin(
            np.arange(problem.queries), block_size=grouping.block_size, causal_offset=problem.causal_offset
        )
    centred = reference.subspace_scores(Q, K - mean, maps.sampling[b, h_x], maps.fusion[b, h_x], **sizes)
    scores: Rows = problem.scale * (centred + (Q @ mean)[:, np.newaxis])
    return scores


def replace_by_best(maps: reference.Maps, inputs: demo.Inputs, problem: Problem, grouping: Grouping | Subspace) -> None:
    """Write the maps of the truncated singular value decomposition of each block's scores: no others do better."""
    for b, h in np.ndindex(maps.ranks.shape[:2]):
        q, k = centred_head(inputs, problem, grouping, b, h)
        for c in range(problem.blocks):
            X, Y = rows_of_block(q, k, problem, grouping, c)
            _, own = np.linalg.qr(X)
            Y = Y.reshape(-1, problem.width)
            _, other = np.linalg.qr(Y)
            U, singular, _ = np.linalg.svd(own @ other.T)
            leading = U[:, : problem.rank]
            maps.sampling[b, h, c] = np.linalg.pinv(own) @ leading
            maps.fusion[b, h, c] = own.T @ leading
            tail = np.sqrt(np.square(singular[problem.rank :]).sum())
            maps.score_errors[b, h, c] = problem.scale * tail / np.sqrt(max(len(X) * len(Y), 1))


def centred_head(
    inputs: demo.Inputs, problem: Problem, grouping: Grouping | Subspace, b: int, h: int
) -> tuple[Rows, Rows]:
    """Return the queries (heads, N, D) and centred keys (M, D) that the maps of one head come from (eq. 12)."""
    shared = problem.heads_per_kv_head
    heads, h_kv = (slice(h * shared, (h + 1) * shared), h) if grouping.by == "keys" else (slice(h, h + 1), h // shared)
    K = inputs.k[b, h_kv].astype(np.float64)
    return inputs.q[b, heads].astype(np.float64), K - K.mean(axis=0)


def _predicted_error(problem: Problem, grouping: Grouping | Subspace, maps: reference.Maps) -> float:
    """Return the root mean square of the predictions, over the pairs that they are for and the exact ones."""
    edges = block_edges(problem.grouped_rows, grouping.block_size)
    pairs = [(stop - start) * met for (start, stop), met in zip(edges, rows_met(problem), strict=True)]
    squares = np.square(maps.score_errors).mean(axis=(0, 1)) @ pairs
    all_pairs = sum(pairs)
    if problem.own_block_is_exact:
        all_pairs = visible_pairs(problem.queries, problem.keys, problem.causal_offset)
    return float(np.sqrt(squares / all_pairs))


def _softmax(S: Rows) -> Rows:
    P: Rows = np.exp(S - S.max(axis=1, keepdims=True))
    P /= P.sum(axis=1, keepdims=True)
    return P


def markdown(lines: list[Measured]) -> str:
    """Return the table."""
    rows = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1))]
    for line in lines:
        ratio = "" if line.predicted is None else f"{line.predicted / line.score_error:.2f}"
        rows.append(
            (
                line.label,
                line.blocks,
                f"{line.mean_rank:.0f}",
                f"{line.output_error:.3f}",
                f"{line.total_variation:.3f}",
                f"{line.score_error:.2f}",
                ratio,
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
