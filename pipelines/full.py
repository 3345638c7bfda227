"""The whole adaptation: images, collect, propagate, separate, distill, evaluate,
export, report.

    python pipelines/full.py demo
    python pipelines/full.py folder --images DIR --classes person,dog --cloud https://detector.example.com
    python pipelines/full.py thermal --assets DIR
    ray job submit --working-dir . -- python pipelines/full.py demo --root s3://bucket/run

The graph itself is ``coin_ray/runs/graph.py``.
"""

import sys

from coin_ray.commands.arguments import main

if __name__ == "__main__":
    sys.exit(main("full.py", __doc__))
