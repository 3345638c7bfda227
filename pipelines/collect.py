"""Ask the cloud about every image and CLIP about every box, running first whatever this needs and is not finished.

python pipelines/collect.py demo [--dry-run]
"""

import sys

from coin_ray.cli import main

if __name__ == "__main__":
    sys.exit(main("collect.py", __doc__, only="collect"))
