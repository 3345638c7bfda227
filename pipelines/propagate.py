"""Train the CLIP detector on cloud boxes with CLIP labels, running first whatever this
needs and is not finished.

python pipelines/propagate.py demo [--dry-run]
"""

import sys

from coin_ray.commands.arguments import main

if __name__ == "__main__":
    sys.exit(main("propagate.py", __doc__, only="propagate"))
