"""Write the student with cached class embeddings, running first whatever this needs and is not finished.

python pipelines/export.py demo [--dry-run]
"""

import sys

from coin_ray.cli import main

if __name__ == "__main__":
    sys.exit(main("export.py", __doc__, only="export"))
