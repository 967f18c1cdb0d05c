"""The question: is each peer what its paper says, exact or convergent where it must be, and its work counted right."""

from __future__ import annotations

import numpy as np
import pytest
from distrattn_np.bench import approximations as peers
from distrattn_np.bench.approximations import hyper, performer

from distrattn_np import exact_attention, reference

CALLS = {
    "hyper": peers.hyper_attention,
    "nystrom": peers.nystrom_attention,
    "performer": peers.performer_attention,
    "hydra": peers.hydra_attention,
    "int8": peers.int8_attention,
}
CAUSAL = [name for name in CALLS if name != "nystrom"]


def arrays(N=40, D=8, E=8, H=4, H_kv=2, dtype=np.float64, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((2, H, N, D), (2, H_kv, N, D), (2, H_kv, N, E))
    return tuple((scale * rng.standard_normal(shape)).astype(dtype) for shape in shapes)


def relative_error(out, expected):
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


class TestAll:
    @pytest.mark.parametrize("name", CALLS)
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_shape_and_dtype(self, name, dtype):
        q, k, v = arrays(N=37, dtype=dtype)
        out = CALLS[name](q, k, v)
        assert out.shape == q.shape
        assert out.dtype == dtype
        assert np.isfinite(out).all()

    @pytest.mark.parametrize("name", CALLS)
    def test_query_heads_share_key_heads(self, name):
        q, k, v = arrays()
        repeated = CALLS[name](q, np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1))
        np.testing.assert_allclose(CALLS[name](q, k, v), repeated, rtol=1e-12)

    @pytest.mark.parametrize("name", CAUSAL)
    def test_causal_rows_do_not_see_later_values(self, name):
        q, k, v = arrays(N=300, dtype=np.float32)
        changed = v.copy()
        changed[:, :, 200:] += 5
        before, after = (CALLS[name](q, k, values, causal=True) for values in (v, changed))
        np.testing.assert_array_equal(before[:, :, :200], after[:, :, :200])
        assert not np.allclose(before[:, :, 200:], after[:, :, 200:])

    @pytest.mark.parametrize("name", [name for name in CALLS if name not in ("hydra", "nystrom")])
    @pytest.mark.parametrize("causal", [False, True])
    def test_rows_are_means_of_values(self, name, causal):
        q, k, v = arrays(N=300, scale=0.3)
        out = CALLS[name](q, k, np.ones_like(v), causal=causal)
        np.testing.assert_allclose(out, 1, rtol=1e-6)


class TestHyper:
    @pytest.mark.parametrize("options", [{"block_size": 300, "samples": 10}, {"block_size": 10, "samples": 300}])
    @pytest.mark.parametrize("causal", [False, True])
    def test_exact_where_a_block_or_the_sample_holds_all_keys(self, options, causal):
        q, k, v = arrays(N=300)
        out = peers.hyper_attention(q, k, v, causal=causal, **options)
        np.testing.assert_allclose(out, exact_attention(q, k, v, causal=causal), rtol=1e-9, atol=1e-12)

    def test_the_sample_is_an_unbiased_estimate_of_the_rest(self, monkeypatch):
        q, k, _ = arrays(N=64, H=1, H_kv=1)
        rng = np.random.default_rng(1)
        # the sums themselves, not their quotient
        monkeypatch.setattr(hyper, "_weigh", lambda _, scores, V: (np.exp(scores) @ V, np.zeros(len(scores))))
        planes = rng.standard_normal((8, hyper.BITS))
        Q, K, V = q[0, 0], k[0, 0], np.ones((64, 1))
        draws = (hyper._Hyper(np, planes, rng, 16, 16).full(Q, K, V) for _ in range(4000))
        sums = [out[:, 0] for out, _ in draws]
        wanted = np.exp(Q @ K.T).sum(axis=1)
        spread = np.std(sums, axis=0) / np.sqrt(len(sums))
        assert (spread > 0).all()
        assert (np.abs(np.mean(sums, axis=0) - wanted) < 5 * spread).all()

    def test_error_falls_with_the_sample(self):
        q, k, v = arrays(N=256)
        exact = exact_attention(q, k, v)
        errors = [
            relative_error(peers.hyper_attention(q, k, v, block_size=32, samples=m), exact) for m in (16, 64, 192)
        ]
        assert errors[0] > errors[1] > errors[2]

    def test_blocks_hold_the_heavy_keys(self):
        # eight clusters: a query's keys are those of its own cluster, which share its hash
        rng = np.random.default_rng(0)
        centres = 6 * np.eye(8)[np.repeat(np.arange(8), 32)]
        order = rng.permutation(256)
        q = (centres + 0.1 * rng.standard_normal((256, 8)))[order][np.newaxis, np.newaxis]
        k, v = q[:, :, ::-1].copy(), rng.standard_normal((1, 1, 256, 8))
        exact = exact_attention(q, k, v)
        hashed = relative_error(peers.hyper_attention(q, k, v, block_size=64, samples=8), exact)
        # the same budget without the hash: every row gets a block of arbitrary keys
        shuffled = rng.permutation(256)
        planes = hyper._Hyper(np, np.zeros((8, hyper.BITS)), rng, 64, 8)
        arbitrary, _ = planes.full(q[0, 0] * 8**-0.5, k[0, 0, shuffled], v[0, 0, shuffled])
        assert hashed < 0.5 * relative_error(arbitrary, exact[0, 0])

    def test_work_of_a_causal_call(self):
        options = {"block_size": 32, "samples": 16}
        full = peers.hyper_flop(128, 128, 8, 4, **options)
        pairs = 2 * 128 * (32 + 16 * (1 - 32 / 128)) * (8 + 4)
        assert full == pairs + 2 * 256 * 8 * hyper.BITS
        triangle = 2 * (64 * 65 // 2) * 12
        cross = peers.hyper_flop(64, 64, 8, 4, **options)
        assert peers.hyper_flop(128, 128, 8, 4, causal=True, **options) == 2 * triangle + cross


class TestNystrom:
    def test_exact_where_every_row_is_a_landmark(self):
        q, k, v = arrays(N=12)
        out = peers.nystrom_attention(q, k, v, landmarks=12, iterations=60)
        np.testing.assert_allclose(out, exact_attention(q, k, v), rtol=1e-6, atol=1e-8)

    def test_exact_for_rows_equal_within_runs(self):
        q, k, v = arrays(N=6)
        q, k = (np.repeat(x, 5, axis=2) for x in (q, k))
        v = arrays(N=30)[2]
        out = peers.nystrom_attention(q, k, v, landmarks=6, iterations=60)
        np.testing.assert_allclose(out, exact_attention(q, k, v), rtol=1e-6, atol=1e-8)

    def test_inverse_converges(self):
        q, k, v = arrays(N=12)
        exact = exact_attention(q, k, v)
        errors = [
            relative_error(peers.nystrom_attention(q, k, v, landmarks=12, iterations=i), exact) for i in (2, 10, 20)
        ]
        assert errors[0] > 10 * errors[1] > 100 * errors[2]

    def test_no_causal_form(self):
        with pytest.raises(NotImplementedError, match="nystrom: has no causal form"):
            peers.nystrom_attention(*arrays(), causal=True)

    def test_work(self):
        N, D, E, m = 10, 3, 5, 4
        products = N * m * D + m * m * D + m * N * D + 6 * 4 * m**3 + m * N * E + m * m * E + N * m * E
        assert peers.nystrom_flop(N, N, D, E, landmarks=m) == 2 * products + 2 * N * D


class TestPerformer:
    @pytest.mark.parametrize("causal", [False, True])
    def test_error_falls_as_one_over_root_of_features(self, causal):
        q, k, v = arrays(N=150, scale=0.4)
        exact = exact_attention(q, k, v, causal=causal)

        def error(features):
            outs = [peers.performer_attention(q, k, v, causal=causal, features=features, seed=s) for s in range(12)]
            return np.sqrt(np.mean([relative_error(out, exact) ** 2 for out in outs]))

        few, many = error(64), error(64 * 64)
        assert 6 < few / many < 11  # a factor of 8, and what twelve seeds leave open
        assert many < 0.05

    def test_features_are_orthogonal_in_groups_and_of_normal_length(self):
        directions = performer.orthogonal_features(8 * 500, 8, seed=0)
        first = directions[:8] @ directions[:8].T
        np.testing.assert_allclose(first - np.diag(np.diag(first)), 0, atol=1e-12)
        assert np.mean(np.sum(directions**2, axis=1)) == pytest.approx(8, rel=0.03)
        # each of the 64 entries of a group is as likely positive as negative
        assert np.abs(directions.reshape(-1, 64).mean(axis=0)).max() < 4 / np.sqrt(500)

    def test_large_inputs_stay_finite(self):
        q, k, v = arrays(scale=30, dtype=np.float32)
        for causal in (False, True):
            assert np.isfinite(peers.performer_attention(q, k, v, causal=causal)).all()

    def test_work(self):
        N, M, D, E, m = 10, 12, 3, 5, 4
        assert peers.performer_flop(N, M, D, E, features=m) == 2 * (N + M) * m * (D + E + 1)
        causal = peers.performer_flop(130, 130, D, E, causal=True, features=m)
        within = 128 * 129 // 2 + 2 * 3 // 2
        assert causal == 2 * 260 * m * (D + E + 1) + 2 * within * (m + E + 1)


class TestHydra:
    @pytest.mark.parametrize("causal", [False, True])
    def test_linear_attention_with_one_channel_a_head(self, causal):
        q, k, v = arrays(N=9, H=2, H_kv=2)
        out = peers.hydra_attention(q, k, v, causal=causal)

        def joined(x):
            return x.transpose(0, 2, 1, 3).reshape(2, 9, 16)

        unit_q, unit_k = (joined(x) / np.linalg.norm(joined(x), axis=2, keepdims=True) for x in (q, k))
        seen = reference.visible_keys(9, 9, 0 if causal else None)
        for b in range(2):
            for channel in range(16):  # a head: its N x N matrix of similarities, and one column of values
                similar = np.outer(unit_q[b, :, channel], unit_k[b, :, channel]) * seen
                expected = similar @ joined(v)[b, :, channel]
                np.testing.assert_allclose(joined(out)[b, :, channel], expected, rtol=1e-12, atol=1e-14)

    def test_one_token(self):
        q = np.full((1, 1, 1, 4), 2.0)
        v = np.arange(4.0).reshape(1, 1, 1, 4)
        np.testing.assert_allclose(peers.hydra_attention(q, q, v), v / 4)  # unit rows have entries of a half


class TestInt8:
    @pytest.mark.parametrize("causal", [False, True])
    def test_exact_for_values_on_the_grid(self, causal):
        rng = np.random.default_rng(0)
        q = rng.integers(-127, 128, (1, 2, 200, 16)).astype(np.float32)
        k = rng.integers(-127, 128, (1, 2, 200, 16)).astype(np.float32)
        q[:, :, ::64], k[:, :, ::64] = 127, 127  # every block of rows reaches the end of the grid, so its step is one
        k[:, :, 1::2] = -k[:, :, ::2]  # a mean of zero
        q, k = q / 1024, k / 16
        v = rng.standard_normal((1, 2, 200, 16), dtype=np.float32)
        out = peers.int8_attention(q, k, v, causal=causal)
        np.testing.assert_allclose(out, exact_attention(q, k, v, causal=causal), rtol=1e-5, atol=1e-6)

    def test_error_is_that_of_half_a_step(self):
        q, k, v = arrays(N=200, D=16, E=16)
        exact = exact_attention(q, k, v)
        assert 1e-4 < relative_error(peers.int8_attention(q, k, v), exact) < 0.03

    def test_an_offset_of_all_keys_costs_nothing(self):
        q, k, v = arrays(N=200, D=16, E=16)
        np.testing.assert_allclose(
            peers.int8_attention(q, k + 100, v), peers.int8_attention(q, k, v), rtol=1e-6, atol=1e-9
        )

    def test_zeros(self):
        q, k, v = arrays(N=5)
        out = peers.int8_attention(np.zeros_like(q), k, v)
        np.testing.assert_allclose(out, exact_attention(np.zeros_like(q), k, v))
