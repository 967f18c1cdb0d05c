"""Whether JAX's attention on a CPU gives the same, for masks, biases, windows, limits, grouped heads and lengths."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from distrattn_np.reference import visible_keys
from kit.compare import assert_agrees

from distrattn_np import distr_attention, exact_attention

jax = pytest.importorskip("jax", reason="pip install 'distrattn_np[jax]'")
jnp = jax.numpy

B, H, D = 2, 4, 16
SIZES = [(24, 24), (13, 30), (30, 13)]
LIMITS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"local_window_size": (5, 0)},
    {"local_window_size": (3, 4)},
    {"is_causal": True, "local_window_size": (6, 2)},
]
ADDED = ["", "mask", "bias", "mask bias", "lengths", "mask bias lengths"]


@pytest.fixture(autouse=True)
def on_a_cpu() -> Iterator[None]:
    """Compute as on any machine: a GPU's default precision of float32 products is less than float32's."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def draw(N: int, M: int, H_kv: int, names: str) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng([N, M, H_kv, len(names)])
    q, k, v = (
        rng.standard_normal(shape, dtype=np.float32) for shape in ((B, N, H, D), (B, M, H_kv, D), (B, M, H_kv, D))
    )
    added: dict[str, np.ndarray] = {}
    if "mask" in names:
        added["mask"] = rng.random((B, 1, N, M)) < 0.6
    if "bias" in names:
        added["bias"] = rng.standard_normal((1, H, N, M), dtype=np.float32)
    if "lengths" in names:
        added["query_seq_lengths"] = np.array([N, N - 4], np.int32)
        added["key_value_seq_lengths"] = np.array([M - 5, M], np.int32)
    return [q, k, v], added


def our_options(N: int, M: int, limits: dict[str, Any], added: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the arguments of our call: lengths become part of the mask."""
    options: dict[str, Any] = {"layout": "bnhd", "window": limits.get("local_window_size"), "bias": added.get("bias")}
    options["causal"] = "top-left" if "is_causal" in limits else False
    mask = added.get("mask")
    if "query_seq_lengths" in added:
        rows = np.arange(N)[:, None] < added["query_seq_lengths"][:, None, None, None]
        mask = (
            rows
            & (np.arange(M) < added["key_value_seq_lengths"][:, None, None, None])
            & (True if mask is None else mask)
        )
    return options | {"mask": mask}


@pytest.mark.parametrize("H_kv", [4, 2, 1])
@pytest.mark.parametrize("names", ADDED, ids=lambda names: names.replace(" ", "+") or "plain")
@pytest.mark.parametrize(
    ("size", "limits"),
    # where the lengths differ, JAX's window stands at the other corner unless the call is causal
    [(s, x) for s, x in itertools.product(SIZES, LIMITS) if s[0] == s[1] or "is_causal" in x or not x],
    ids=str,
)
def test_jax_gives_the_same(size: tuple[int, int], limits: dict[str, Any], names: str, H_kv: int) -> None:
    N, M = size
    arrays, added = draw(N, M, H_kv, names)
    given = {name: jnp.asarray(x) for name, x in added.items()}
    expected, expected_lse = jax.nn.dot_product_attention(*arrays, **given, **limits, return_residual=True)
    options = our_options(N, M, limits, added)
    out, lse = exact_attention(*arrays, **options, return_lse=True)
    shown = visible_keys(N, M, 0 if options["causal"] else None, options["window"] or (None, None))
    shown = np.broadcast_to(shown if options["mask"] is None else shown & options["mask"], (B, H, N, M)).any(axis=3)
    # JAX gives a row without a key the mean of all values
    assert (out.transpose(0, 2, 1, 3)[~shown] == 0).all()
    assert (lse[~shown] == -np.inf).all()
    expected = np.where(shown.transpose(0, 2, 1)[..., None], np.asarray(expected), 0)
    assert_agrees(out, expected, rtol=1e-5, atol=2e-6, check_kind=False)
    assert_agrees(lse[shown], np.asarray(expected_lse).transpose(0, 2, 1)[shown], rtol=1e-5, atol=2e-6)
    same = distr_attention(*arrays, **options, method="subspace", group_size=1)
    assert_agrees(same, out, rtol=0, atol=0)
