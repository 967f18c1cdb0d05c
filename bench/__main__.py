"""``python -m distrattn_np.bench``: the same as ``distrattn bench``."""

import sys

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
