"""``coin-ray evaluate``, as a script for ``ray job submit``."""

import sys

from coin_ray.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
