"""``python -m socks5srv``, and the script ``socks5srv``: see cli/."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
