"""Which fusion of two disputed opinions teaches best: one teacher, rules, Dawid-Skene,
CKG; with the published threshold and a fair one.

    python pipelines/compare.py demo [--seeds 0 1 2] [--quick] [--dry-run]

Shares images, answers and trained teachers with other runs below the same --root.
Results: ROOT/fusion.{json,md,svg} and MLflow.
"""

import sys

from coin_ray.commands.grid import Request, main


def work(request: Request) -> None:
    from coin_ray.experiments.studies import fusion
    from coin_ray.experiments.tuning import under_tune

    fusion(request, under_tune)


if __name__ == "__main__":
    sys.exit(main("compare.py", __doc__, work))
