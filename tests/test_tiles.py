"""Are keys split so that a device is busy, and do tiles fit it? No GPU is needed to judge."""

from __future__ import annotations

import pytest

from distrattn_np.problem import ceil_div
from distrattn_np.tiles import DecodeTiles, decode_splits, decode_tiles

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
