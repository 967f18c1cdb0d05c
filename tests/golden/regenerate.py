"""Write the numbers that test_sample.py compares with: the float64 reference on the packaged sample.

Run it only when the method itself changes, and say why in the commit: python tests/golden/regenerate.py
"""

import json
import platform
from importlib import resources
from pathlib import Path

import numpy as np

from distrattn_np import reference

HERE = Path(__file__).parent
LSH = {"method": "lsh", "block_size": 1024, "group_by": "queries", "seed": 0}
SUBSPACE = {"method": "subspace", "block_size": 128, "group_by": "keys", "refine": 1}
CASES = {
    "exact": LSH | {"group_size": 1, "fusion": "sum"},
    "subspace_g2": SUBSPACE | {"group_size": 2},
    "subspace_g4": SUBSPACE | {"group_size": 4},
    "lsh_g2": LSH | {"group_size": 2, "fusion": "sum"},
    "lsh_g4": LSH | {"group_size": 4, "fusion": "sum"},
    "lsh_g2_lstsq": LSH | {"group_size": 2, "fusion": "lstsq"},
}
ROWS = [0, 1, 1023, 1024, 1535]  # first, second, both sides of the edge between the blocks, last


def lsh_scores(q, k, **options):
    """Yield the unscaled scores of every head, (N, M); blocks over queries, causal."""
    H, H_kv = q.shape[1], k.shape[1]
    channels, gains = reference.group_maps(q, k, causal_offset=k.shape[2] - q.shape[2], **options)
    sizes = {name: options[name] for name in ("group_size", "block_size", "group_by")}
    for b, h in np.ndindex(q.shape[:2]):
        gain = None if gains is None else gains[b, h]
        yield reference.fused_scores(q[b, h], k[b, h * H_kv // H], channels[b, h], gain, **sizes)


def subspace_scores(q, k, scale, group_size, **options):
    """Yield the unscaled scores of every head, (N, M); blocks over keys, causal."""
    H, H_kv, D = q.shape[1], k.shape[1], q.shape[3]
    offset = k.shape[2] - q.shape[2]
    rank = D // group_size
    maps = reference.make_maps(q, k, scale=scale, rank=rank, score_tol=None, causal_offset=offset, **options)
    sizes = {name: options[name] for name in ("block_size", "group_by")}
    own = reference.own_block_begin(np.arange(q.shape[2]), block_size=options["block_size"], causal_offset=offset)
    for b, h in np.ndindex(q.shape[:2]):
        h_kv = h * H_kv // H
        K = k[b, h_kv] - maps.key_mean[b, h_kv]
        yield reference.subspace_scores(
            q[b, h], K, maps.sampling[b, h_kv], maps.fusion[b, h_kv], exact_from=own, **sizes
        )


def attention_matrices(q, k, scale, method, **options):
    """Return P of every head, (B, H, N, M) float64, from the reference's scores; causal."""
    B, H, N, _ = q.shape
    M = k.shape[2]
    scores = lsh_scores(q, k, **options) if method == "lsh" else subspace_scores(q, k, scale, **options)
    seen = reference.visible_keys(N, M, M - N)
    P = np.zeros((B, H, N, M))
    for (b, h), S in zip(np.ndindex(B, H), scores, strict=True):
        P[b, h] = np.exp(np.where(seen, scale * S, -np.inf))
        P[b, h] /= P[b, h].sum(axis=1, keepdims=True)
    return P


def main():
    folder = resources.files("distrattn_np.data")
    origin = json.loads(folder.joinpath("smollm2_sample.json").read_text(encoding="utf-8"))
    with folder.joinpath("smollm2_sample.npz").open("rb") as file, np.load(file) as arrays:
        q, k, v = (arrays[name].astype(np.float64) for name in "qkv")
    values = v.repeat(q.shape[1] // v.shape[1], axis=1)
    golden = {}
    for name, case in CASES.items():
        P = attention_matrices(q, k, origin["scale"], **case)
        O = P @ values
        if name == "exact":
            exact_P, exact_O = P, O
        difference = np.linalg.norm(O - exact_O, axis=(2, 3)) / np.linalg.norm(exact_O, axis=(2, 3))
        golden[f"{name}_relative_error"] = difference
        golden[f"{name}_total_variation"] = 0.5 * np.abs(P - exact_P).sum(axis=3).mean(axis=2)
        golden[f"{name}_rows"] = O[:, :, ROWS].astype(np.float32)
    np.savez_compressed(HERE / "sample.npz", **golden)
    about = {
        "what": "float64 reference on distrattn_np/data/smollm2_sample.npz: per head the relative error of the output "
        "and the mean total variation of the rows of P, both against exact attention; the output of a few queries",
        "written_by": "tests/golden/regenerate.py",
        "numpy": np.__version__,
        "python": platform.python_version(),
        "sample_sha256": origin["sha256"],
        "cases": CASES,
        "rows": ROWS,
    }
    (HERE / "sample.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
