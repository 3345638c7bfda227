"""Measure every teacher and student on the held-out images, running first whatever this
needs and is not finished.

python pipelines/evaluate.py demo [--dry-run]
"""

import sys

from coin_ray.commands.arguments import main

if __name__ == "__main__":
    sys.exit(main("evaluate.py", __doc__, only="evaluate"))
