"""What each loss and each stage is worth: COIN with one of them left out, over several
seeds.

    python pipelines/ablate.py demo [--seeds 0 1 2] [--quick] [--dry-run]
    python pipelines/ablate.py co-detr [--data coco:DIR --classes person,dog] [--seeds 0 1 2] [--quick] [--dry-run]

Shares images, answers and trained teachers with other runs below the same --root.
Results: ROOT/ablation.{json,md,svg} and MLflow. co-detr: what Co-DETR's auxiliary heads
and positive queries are worth, on the demo's source scenes or on labelled images, with
the settings of train_detector.py. Results: ROOT/components.{json,md}.
"""

import sys

from coin_ray.commands.grid import Request, main


def work(request: Request) -> None:
    from coin_ray.experiments.studies import ablation
    from coin_ray.experiments.tuning import under_tune

    ablation(request, under_tune)


if __name__ == "__main__":
    if sys.argv[1:2] == ["co-detr"]:
        from coin_ray.experiments import components

        sys.exit(components.main(sys.argv[2:], "ablate.py co-detr", __doc__))
    sys.exit(main("ablate.py", __doc__, work))
