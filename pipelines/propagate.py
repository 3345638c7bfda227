"""``coin-ray propagate``, as a script for ``ray job submit``."""

import sys

from coin_ray.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["propagate", *sys.argv[1:]]))
