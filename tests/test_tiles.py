"""Are keys split so that a device is busy, and do tiles fit it? No GPU is needed to judge."""

from __future__ import annotations

import pytest

from distrattn_np.problem import ceil_div
from distrattn_np.tiles import DecodeTiles, Sm90Grid, decode_splits, decode_tiles, sm90_grid, sm90_splits

H100 = 132, 227 << 10


@pytest.mark.parametrize("items", [1, 8, 64, 200, 264, 265, 5000])
@pytest.mark.parametrize("keys", [1, 64, 65, 1000, 32768, 32769, 10**6])
def test_splits_hold_every_key_once_and_leave_none_empty(keys: int, items: int) -> None:
    splits, keys_per_split = decode_splits(keys, 64, items, 264)
    assert keys_per_split % 64 == 0
    assert (splits - 1) * keys_per_split < keys <= splits * keys_per_split


def test_splits_fill_an_h100() -> None:
    # B = 8, 8 key heads, 32768 keys: four splits of each head are 256 of 264 thread blocks, all of one length
    assert decode_splits(32768, 64, 64, 264) == decode_splits(32768, 128, 64, 264) == (4, 8192)
    # one request: every multiprocessor has work
    splits, _ = decode_splits(32768, 64, 8, 264)
    assert 0.9 < 8 * splits / 264 <= 1
    # heads alone fill it
    assert decode_splits(32768, 64, 264, 264)[0] == 1
    # a short cache is not cut into crumbs
    assert decode_splits(256, 64, 8, 264)[0] == 1


@pytest.mark.parametrize("limit", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 64, 256])
@pytest.mark.parametrize(("D", "R", "E"), [(128, 64, 128), (128, None, 128), (256, 256, 256), (64, 16, 64), (1, 1, 1)])
def test_tiles_fit_and_are_no_wider_than_their_rows(D: int, R: int | None, E: int, rows: int, limit: int) -> None:
    tiles = decode_tiles(D, R, E, rows, limit)
    assert tiles.shared_bytes(D, R, E) + 1024 <= limit
    assert tiles.rows == 16 or tiles.rows < 2 * rows
    assert ceil_div(64, tiles.rows) <= 4


@pytest.mark.parametrize(
    ("R", "block_size", "tiles"),
    [
        (64, 1024, DecodeTiles(1, 8, 128, 2)),
        (32, 128, DecodeTiles(1, 8, 128, 2)),
        (64, 64, DecodeTiles(1, 4, 64, 2)),  # half of a tile of 128 keys would be empty
        (None, None, DecodeTiles(1, 4, 64, 2)),  # two blocks of 128 keys do not fit
    ],
)
def test_two_blocks_share_a_multiprocessor_where_they_are_timed(
    R: int | None, block_size: int | None, tiles: DecodeTiles
) -> None:
    _, limit = H100
    assert decode_tiles(128, R, 128, 4, limit, block_size) == tiles
    assert 2 * (tiles.shared_bytes(128, R, 128) + 2048) <= limit + 1024


def test_narrow_rows_have_more_buffers() -> None:
    assert decode_tiles(16, None, 16, 4, 227 << 10).stages > decode_tiles(128, None, 128, 4, 227 << 10).stages


def test_bad_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="whole 16-key tiles"):
        DecodeTiles(1, 4, 48, 2)


def grid(items: int, query_tiles: int, *, causal: int = 1, keys: int = 4096, heads_per_kv_head: int = 1) -> Sm90Grid:
    defines = {"CAUSAL": causal, "MAX_ROUNDS": 31, "R": 128, "E": 128, "BLOCK_KV": 64}
    sizes = {"items": items, "query_tiles": query_tiles, "keys": keys, "heads_per_kv_head": heads_per_kv_head}
    return sm90_grid(defines, **sizes, multiprocessors=132)


@pytest.mark.parametrize("items", [1, 8, 33, 256, 5120, 70_000])
@pytest.mark.parametrize("query_tiles", [1, 2, 22, 128, 4096])
def test_all_causal_tiles_are_dealt_out_in_rounds_that_a_thread_block_has(items: int, query_tiles: int) -> None:
    found = grid(items, query_tiles)
    rounds = ceil_div(found.items_dealt * query_tiles, found.blocks_at_once)
    assert 1 <= rounds <= 31
    assert found.blocks % found.blocks_at_once == 0
    sections = found.blocks // found.blocks_at_once * (31 // rounds)
    assert sections * found.items_dealt >= items
    assert found.blocks <= items * query_tiles


def test_keys_of_heads_that_are_dealt_together_stay_in_the_cache() -> None:
    assert grid(256, 22, keys=4096).items_dealt <= 16  # 2 MB each
    assert grid(256, 22, keys=4096, heads_per_kv_head=4).items_dealt > 16
    assert grid(256, 86, keys=16384).items_dealt == 8


def test_full_calls_have_a_thread_block_a_multiprocessor() -> None:
    assert grid(33, 128, causal=0) == Sm90Grid(2 * 132, 33 * 128, whole_tiles=33 * 128, keys_per_split=4096)
    assert grid(1, 5, causal=0, keys=64) == Sm90Grid(5, 5, whole_tiles=5, keys_per_split=64)


@pytest.mark.parametrize("tiles", [1, 5, 132, 133, 200, 1376, 4096])
@pytest.mark.parametrize("keys", [1, 64, 65, 1000, 32768, 32769])
def test_tiles_that_do_not_fill_a_device_are_split_into_all_their_keys(tiles: int, keys: int) -> None:
    whole, splits, keys_per_split = sm90_splits(tiles, keys, 64, 132)
    assert keys_per_split % 64 == 0
    assert (splits - 1) * keys_per_split < keys <= splits * keys_per_split
    assert whole == tiles or (splits > 1 and whole == tiles // 132 * 132)


def test_splits_are_where_they_are_faster() -> None:
    assert sm90_splits(8, 8192, 64, 132) == (0, 13, 640)  # few queries: eight tiles on 104 multiprocessors
    assert sm90_splits(1376, 8192, 64, 132) == (1320, 2, 4096)  # the last round keeps 112 of them busy instead of 56
    assert sm90_splits(131, 8192, 64, 132)[1] == 1
    assert sm90_splits(8, 512, 64, 132)[1] == 1  # not worth another launch
