"""``python -m distrattn_np``: the same as the ``distrattn`` command."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
