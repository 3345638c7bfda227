"""Train the student on the separated knowledge, running first whatever this needs and
is not finished.

python pipelines/distill.py demo [--dry-run]
"""

import sys

from coin_ray.commands.arguments import main

if __name__ == "__main__":
    sys.exit(main("distill.py", __doc__, only="distill"))
