// work_item.cuh - which query rows a thread block of a forward kernel owns, and how far they can see.
//
// A work item is one (batch, head, query block), query block fastest:
//
//   item = (b * H + h) * query_blocks + c,     rows c * query_block_size ... of that head
//
// Blocks over queries (eq. 4 of docs/math.md) have query_block_size = L. Exact attention and blocks over keys have
// one item per head: query_blocks = 1, query_block_size = N. A launch covers the items from first_item on, so that a
// bounded workspace can serve one launch after the other:
//
//   positions = (items of this launch) * query_tiles,     query_tiles = ceil_div(query_block_size, BLOCK_Q)
//
// A thread block has a position of its own, or takes every gridDim.x-th, or those of a `Deal`.
//
// SPLITS_KEYS: the tiles that would not fill the device are cut along their keys (KeySplits).
//
// RAGGED: c counts the pieces of sequences.cuh, of query_block_size queries, and the batch is 1. Exact attention and
// blocks over keys have pieces of BLOCK_Q queries then. Queries are counted in the array, the keys of the item's
// sequence from its first one.

#pragma once
#include "sequences.cuh"

#ifndef SPLITS_KEYS
#define SPLITS_KEYS 0
#endif

struct WorkItem {
  int b, h, c;
  int launch_item;             // counts from the launch's first item: the item's place in a workspace
  int query_begin, query_end;  // past the end; not above query_begin where the tile is empty
#if RAGGED
  Piece piece;
#endif
#if SPLITS_KEYS
  int split;  // none: -1
  int split_begin, split_keys;
#endif

  // Of these keys M of a head, those of the item's sequence or split.
  __device__ __forceinline__ int keys(int M) const {
#if RAGGED
    return piece.other_rows;
#elif SPLITS_KEYS
    return min(split_keys, M - split_begin);
#else
    return M;
#endif
  }

  // Where these begin.
  __device__ __forceinline__ int first_key() const {
#if RAGGED
    return piece.other_begin;
#elif SPLITS_KEYS
    return split_begin;
#else
    return 0;
#endif
  }

  // A limit of the keys that query n sees, n + offset: from one that is meant from the diagonal of the sequence.
  __device__ __forceinline__ int key_offset(int offset) const {
#if RAGGED
    return offset + piece.diagonal - piece.begin;
#else
    return offset;
#endif
  }

  // Of arrays that have a row for each sequence, in the place of the batch.
  __device__ __forceinline__ int sequence() const {
#if RAGGED
    return piece.sequence;
#else
    return b;
#endif
  }

  // The first of the sequence's blocks of keys, among those of a head.
  __device__ __forceinline__ int first_key_block() const {
#if RAGGED
    return piece.other_first;
#else
    return 0;
#endif
  }
};

#if SPLITS_KEYS
// From position `first` on, every tile has `count` positions, one after the other, each with `keys` keys of it, the last
// with what is left. Their results meet in merge_splits.cu.
struct KeySplits {
  int first, count, keys;

  __device__ __forceinline__ bool are_of(int position) const { return position >= first; }

  __device__ __forceinline__ int tile_of(int position) const {
    return are_of(position) ? first + (position - first) / count : position;
  }

  __device__ __forceinline__ void cut(WorkItem& work, int position, int M) const {
    work.split = are_of(position) ? (position - first) % count : -1;
    work.split_begin = are_of(position) ? work.split * keys : 0;
    work.split_keys = are_of(position) ? keys : M;
  }
};
#endif

// How the positions of a causal call are dealt out where thread blocks take several: `thread_blocks` of them, as many as
// run at a time, share the tiles of `items` work items, the longest first, forwards and backwards in turn, so that each gets
// as much; and then those of as many more items, until they have had most_rounds. The items, which are whole heads, are
// so few that their keys stay in the L2 cache.
struct Deal {
  int items, thread_blocks;
  int all_items, query_tiles;  // of an item
  int most_rounds;

  __device__ __forceinline__ int rounds_each() const {  // of a section, the tiles that are shared
    return (items * query_tiles + thread_blocks - 1) / thread_blocks;
  }

  __device__ __forceinline__ int first_section() const {
    return blockIdx.x / thread_blocks * (most_rounds / rounds_each());
  }

  // How many this thread block has.
  __device__ __forceinline__ int rounds() const {
    const int sections_left = (all_items + items - 1) / items - first_section();
    return min(most_rounds / rounds_each(), sections_left) * rounds_each();
  }

  // Its position in one of them; past the last where a section ends before.
  __device__ __forceinline__ int position(int round) const {
    const int each = rounds_each(), section = first_section() + round / each;
    const int items_left = min(items, all_items - section * items), player = blockIdx.x % thread_blocks;
    const bool is_backwards = (section + round % each) % 2;
    const int place = round % each * thread_blocks + (is_backwards ? thread_blocks - 1 - player : player);
    if (place >= items_left * query_tiles) return all_items * query_tiles;
    return (section * items + place % items_left + 1) * query_tiles - 1 - place / items_left;
  }
};

// `longest_first` is for causal calls: the last tiles of a head see the most keys, and a long tile that starts late
// keeps the whole device waiting.
__device__ __forceinline__ WorkItem find_work(int block_q, int H, int N, int query_blocks, int query_block_size,
                                              int first_item, bool longest_first, Pieces pieces,
                                              int block = blockIdx.x) {
  const int position = longest_first ? gridDim.x - 1 - block : block;
  const int query_tiles = (query_block_size + block_q - 1) / block_q;
  WorkItem work;
  work.launch_item = position / query_tiles;
  const int item = first_item + work.launch_item;
  work.c = item % query_blocks;
  work.h = item / query_blocks % H;
  work.b = item / query_blocks / H;

#if RAGGED
  work.piece = pieces[work.c];
  const int block_begin = work.piece.begin + work.piece.index * query_block_size;
  const int head_end = work.piece.begin + work.piece.rows;
#else
  const int block_begin = work.c * query_block_size;
  const int head_end = N;
#endif
  const int block_end = block_begin + min(query_block_size, head_end - block_begin);
  work.query_begin = block_begin + position % query_tiles * block_q;
  work.query_end = min(work.query_begin + block_q, block_end);
  return work;
}

// Past the last key that a row before query_end sees: query n sees m <= n + causal_offset (eq. 3).
__device__ __forceinline__ int visible_key_end(int query_end, int M, int causal_offset) {
  return max(0, min(M, query_end + causal_offset));
}

// First key that a row from query_begin on sees: query n sees m >= n + window_offset (eq. 23).
__device__ __forceinline__ int visible_key_begin(int query_begin, int window_offset) {
  return max(0, query_begin + window_offset);
}

// First key that a query scores exactly where own blocks are: that of the block in which its last visible key lies.
__device__ __forceinline__ int own_block_begin(int query, int causal_offset, int key_block_size) {
  return max(0, query + causal_offset) / key_block_size * key_block_size;
}
