"""Split cloud and CLIP-detector results into consistent, inconsistent and private,
running first whatever this needs and is not finished.

python pipelines/separate.py demo [--dry-run]
"""

import sys

from coin_ray.commands.arguments import main

if __name__ == "__main__":
    sys.exit(main("separate.py", __doc__, only="separate"))
