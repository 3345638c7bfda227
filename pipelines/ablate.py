"""What each loss and each stage is worth: COIN with one of them left out, over several seeds.

    python pipelines/ablate.py demo [--seeds 0 1 2] [--quick] [--dry-run]

Shares images, answers and trained teachers with other runs below the same --root. Results: ROOT/ablation.{json,md,svg} and MLflow.
"""

import sys

from coin_ray.experiments.command import Request, main


def work(request: Request) -> None:
    from coin_ray.experiments.studies import ablation
    from coin_ray.experiments.tuning import under_tune

    ablation(request, under_tune)


if __name__ == "__main__":
    sys.exit(main("ablate.py", __doc__, work))
