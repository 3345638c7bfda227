"""Train Co-DETR on labelled images, evaluate it, and write it as one file that can be
served as a cloud.

Or RT-DETRv2 or D-FINE of transformers with Co-DETR's ATSS head beside them, as the
folder that transformers reads.

    python pipelines/train_detector.py --model co-detr --data coco:DIR --val coco:DIR2 --classes person,dog --root RUN
    python pipelines/train_detector.py --model co-detr --data 'DIR#train' --val 'DIR#val' --classes person,dog --root RUN --fit.gpu
    python pipelines/train_detector.py --model co-detr --data demo-source --root RUN
    python pipelines/train_detector.py --model d-fine --network FOLDER --data coco:DIR --classes person,dog --root RUN

Every format of docs/formats.md is read. A killed run goes on by the same command.
Results: RUN/co_detr.pt or RUN/d-fine, RUN/summary.json and MLflow.
"""

import sys

from coin_ray.commands.detector import main

if __name__ == "__main__":
    sys.exit(main("train_detector.py", __doc__))
