"""Write the page with figures, curves and pictures, running first whatever this needs and is not finished; or compare finished runs.

python pipelines/report.py demo [--dry-run]
python pipelines/report.py runs/A runs/B ... [--out comparison.html]
"""

import sys

from coin_ray.cli import main
from coin_ray.report import compare

if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(compare.main(arguments) if compare.runs_of(arguments) else main("report.py", __doc__, only="report"))
