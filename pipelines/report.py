"""Write the page with figures, curves and pictures, running first whatever this needs and is not finished.

python pipelines/report.py demo [--dry-run]
"""

import sys

from coin_ray.cli import main

if __name__ == "__main__":
    sys.exit(main("report.py", __doc__, only="report"))
