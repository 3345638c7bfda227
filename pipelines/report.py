"""Write the page with figures, curves and pictures, running first whatever this needs
and is not finished; or compare finished runs, or list the trials of a search.

python pipelines/report.py demo [--dry-run]
python pipelines/report.py runs/A runs/B ... [--out comparison.html]
python pipelines/report.py runs/A/search/SEARCH                   the page of a search, with the reports made since
"""

import sys

from coin_ray.commands.arguments import main
from coin_ray.report import compare

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if len(arguments) == 1 and "/" in arguments[0]:
        from coin_ray.search import page

        sys.exit(page.main(arguments[0]))
    sys.exit(
        compare.main(arguments)
        if compare.runs_of(arguments)
        else main("report.py", __doc__, only="report")
    )
