"""The question: does a growing cache lose on real inputs what docs/caches.md says, and why does it weigh as it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distrattn_np import demo, distr_attention, exact_attention, group_keys, reference

DOCUMENT = Path(__file__).parents[2] / "docs" / "caches.md"
SIZES = [(32, 128), (16, 128), (48, 256)]  # R, L
FIRST = 512
"""The row from which on errors count: enough keys before it."""


@pytest.fixture(scope="module")
def sample():
    found = demo.load_sample()
    return (*(x.astype(np.float32) for x in (found.q, found.k, found.v)), found.scale)


@pytest.fixture(scope="module")
def exact(sample):
    q, k, v, scale = sample
    return exact_attention(q, k, v, causal=True, scale=scale)


def plain(sample, R, L):
    """Every block's maps for the queries that do meet it."""
    q, k, v, scale = sample
    return distr_attention(q, k, v, causal=True, scale=scale, rank=R, block_size=L)


def from_cache(known):
    """Ask block by block, as one token at a time would; ``known`` queries are given to the cache."""

    def outputs(sample, R, L):
        q, k, v, scale = sample
        q_known = q[:, :, :known] if known else None
        keys = group_keys(k[:, :, :0], q_known, rank=R, block_size=L, scale=scale)
        rows = []
        for start in range(0, k.shape[2], L):
            keys.append(k[:, :, start : start + L])
            seen = keys.shape[2]
            rows.append(distr_attention(q[:, :, start:seen], keys, v[:, :, :seen], causal=True))
        return np.concatenate(rows, axis=2)

    return outputs


def weighed_by(expected_gram, known):
    """Give the cache something else for eq. 28."""

    def outputs(sample, R, L):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("distrattn_np.reference.grouped_keys.expected_gram", expected_gram)
            return from_cache(known)(sample, R, L)

    return outputs


ROWS = {
    "plain call: the queries that do meet it": plain,
    "cache, `q` of 512 tokens, and keys": from_cache(512),
    "cache, `q` of 128 tokens, and keys": from_cache(128),
    "cache, no `q`: keys": from_cache(0),
    "not built: `q` of 512 tokens alone": weighed_by(lambda _, queries: queries, 512),
    "not built: `q` of 128 tokens alone": weighed_by(lambda _, queries: queries, 128),
    "not built: all directions alike": weighed_by(lambda keys, _: np.eye(len(keys)), 0),
}


def errors(sample, exact, name, R, L):
    out = ROWS[name](sample, R, L)
    lost, whole = (np.linalg.norm(x[:, :, FIRST:], axis=(2, 3)) for x in (out - exact, exact))
    return (lost / whole).mean(axis=1)


def table():
    """Return the numbers of the document: name -> a pair of layers for each of SIZES."""
    text = DOCUMENT.read_text(encoding="utf-8")
    lines = text.split("<!-- caches:begin -->")[1].split("<!-- caches:end -->")[0].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {name: [tuple(map(float, pair.split(" / "))) for pair in pairs] for name, *pairs in cells}


def test_the_table_has_these_rows():
    assert list(table()) == list(ROWS)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("size", range(len(SIZES)), ids=lambda i: f"R={SIZES[i][0]}-L={SIZES[i][1]}")
def test_numbers_of_the_document(sample, exact, name, size):
    # half of the last digit, and what other sum orders do to it
    np.testing.assert_allclose(errors(sample, exact, name, *SIZES[size]), table()[name][size], rtol=0, atol=6e-4)


def test_a_cache_loses_little_more_than_a_plain_call():
    found = {name: np.array(pairs) for name, pairs in table().items()}
    plain_call = found["plain call: the queries that do meet it"]
    assert (found["cache, `q` of 128 tokens, and keys"] <= 2 * plain_call).all()
    assert (found["cache, no `q`: keys"] <= 2.5 * plain_call).all()
    # what the keys' part is for
    assert (found["cache, `q` of 128 tokens, and keys"] <= found["not built: `q` of 128 tokens alone"]).all()


def test_appending_token_by_token_is_the_same(sample):
    q, k, v, scale = sample
    keys = group_keys(k[:, :, :700], q[:, :, :128], rank=32, block_size=128, scale=scale)
    rows = from_cache(128)(sample, 32, 128)
    maps = reference.make_key_maps(k[:, :, :701], q[:, :, :128], scale=scale, rank=32, block_size=128)
    assert len(keys.blocks) == maps.ranks.shape[2]
    for token in range(700, 720):
        keys.append(k[:, :, token : token + 1])
        out = distr_attention(q[:, :, token : token + 1], keys, v[:, :, : token + 1], causal=True)
        np.testing.assert_allclose(out[:, :, 0], rows[:, :, token], rtol=0, atol=2e-6)


# as docs/caches.md says; layers 2 and 20
@pytest.mark.parametrize(
    ("options", "factors"), [({"rank": 32}, (2.1, 1.7)), ({"rank": None, "score_tol": 0.1}, (2.6, 2.1))]
)
def test_score_errors_of_later_queries_beside_the_prediction(sample, options, factors):
    q, k, _, scale = sample
    L, known = 128, 128
    maps = reference.make_key_maps(k, q[:, :, :known], scale=scale, block_size=L, **options)
    squares = np.zeros((2, 2))  # measured and predicted, by layer
    for layer, c in np.ndindex(2, maps.ranks.shape[2]):
        later = q[layer, :, max((c + 1) * L, FIRST) :].reshape(-1, q.shape[3]).astype(np.float64)
        W, Z, mean, predicted = (x[layer, 0, c] for x in (maps.sampling, maps.fusion, maps.key_mean, maps.score_errors))
        keys = k[layer, 0, c * L : (c + 1) * L] - mean
        lost = scale * (later @ keys.T - (later @ Z) @ (keys @ W).T)
        squares[:, layer] += (lost**2).sum(), predicted**2 * lost.size
    measured, predicted = np.sqrt(squares)
    np.testing.assert_allclose(measured / predicted, factors, rtol=0, atol=0.05)
