#!/usr/bin/env bash
# Annotation ids that restart in each merged file halve a perfect score in pycocotools, without an error.
#
# Packages: pycocotools 2.0.11, numpy 2.2.6, Python 3.11.
#
# Behaviour: when two COCO files are put together by joining their lists, annotation ids occur twice. Loading says
# nothing. The list per image still has both entries, but each entry is looked up by its id in one table in which
# the last one wins. Image 1 thus gets the box of image 2, and the evaluation files it under image 2: image 1 has
# no truth left, and image 2 has the same object twice.
#
# Seen: two images with one box each, both with id 1. loadAnns for image 1 returns an annotation that says it
# belongs to image 2. Exact detections reach a recall of 0.5 and an AP of 0.252 instead of 1 and 1.
#
# Why it matters: this looks like a bad model, not like a bad file. Unlike image ids, annotation ids are used by nothing that
# people look at, so nobody checks that they differ.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check pycocotools==2.0.11 numpy==2.2.6 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import contextlib
import io

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def measure(ids):
    truth = COCO()
    boxes = {1: [10, 10, 40, 40], 2: [30, 20, 40, 40]}
    truth.dataset = {
        "images": [{"id": i, "width": 100, "height": 80, "file_name": f"{i}.jpg"} for i in boxes],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": number, "image_id": i, "category_id": 1, "bbox": box, "area": 1600, "iscrowd": 0}
                        for number, (i, box) in zip(ids, boxes.items())],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        owner = truth.loadAnns(truth.getAnnIds(imgIds=[1]))[0]["image_id"]
        found = truth.loadRes([{"image_id": i, "category_id": 1, "bbox": box, "score": 1 - i / 10}
                               for i, box in boxes.items()])
        run = COCOeval(truth, found, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return round(float(run.stats[0]), 3), round(float(run.stats[8]), 3), owner


apart, twice = measure((1, 2)), measure((1, 1))
for name, value in (("ids 1 and 2", apart), ("ids 1 and 1", twice)):
    print(f"{name}: AP {value[0]}, recall {value[1]}, the annotation of image 1 belongs to image {value[2]}")
assert apart == (1.0, 1.0, 1), "the plain case changed"
assert twice[1:] == (0.5, 2) and twice[0] < 0.6, "repeated ids are treated otherwise now"
PY
