"""A small sample of real queries, keys and values; its origin and licence stand in the .json beside it."""
