#!/usr/bin/env bash
# pycocotools reads the key "ignore" of a ground-truth box and then throws it away.
#
# Packages: pycocotools 2.0.11, numpy 2.2.6, Python 3.11.
#
# Behaviour: COCO files of several tools (Label Studio and globox among them) carry the key "ignore" beside
# "iscrowd". While it evaluates, pycocotools first takes that key and in the next
# step overwrites it with iscrowd alone. A box with "ignore": 1 is an ordinary box: not finding it is a miss.
#
# Seen: two boxes, one with "ignore": 1, and a detection on the other: recall 0.5 and AP 0.505. With "iscrowd": 1
# instead of it: 1 and 1. The loaded annotation has lost its value: it says 0 after the evaluation.
#
# Why it matters: a truth with marked doubtful objects measures too low a recall, without a word, and the
# annotations in memory are changed, so writing them out afterwards loses the marks. Since "iscrowd" also lets one
# box absorb any number of detections by another overlap, it is no exact replacement either.

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


def measure(mark):
    truth = COCO()
    box = {"category_id": 1, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0, "ignore": 0}
    doubtful = {**box, "id": 1, "image_id": 1, **mark}
    truth.dataset = {
        "images": [{"id": i, "width": 100, "height": 80, "file_name": f"{i}.jpg"} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [doubtful, {**box, "id": 2, "image_id": 2}],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes([{"image_id": 2, "category_id": 1, "bbox": [10, 10, 40, 40], "score": 0.9}])
        run = COCOeval(truth, found, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return round(float(run.stats[0]), 3), round(float(run.stats[8]), 3), int(doubtful["ignore"])


plain, ignored, crowd = measure({}), measure({"ignore": 1}), measure({"iscrowd": 1})
for name, value in (("no mark", plain), ("ignore 1", ignored), ("iscrowd 1", crowd)):
    print(f"{name}: AP {value[0]}, recall {value[1]}, the key ignore afterwards {value[2]}")
assert ignored == plain == (0.505, 0.5, 0), "the key ignore counts now"
assert crowd == (1.0, 1.0, 1), "iscrowd counts otherwise now"
PY
