#!/usr/bin/env bash
# faster-coco-eval counts every ground-truth box without "area" as a small object; pycocotools refuses the file.
#
# Packages: faster-coco-eval 1.8.0, pycocotools 2.0.11, numpy 2.2.6, Python 3.11.
#
# Behaviour: detection sets often leave out "area", since it is width times height. pycocotools stops with a
# KeyError. faster-coco-eval, meant to take its place without other changes, evaluates, but takes the area as 0 instead
# of working it out from the box. Each such object falls into the class "small" (below 32 x 32 pixels).
#
# Seen: one object of 200 x 200 pixels (large), found exactly. With "area": AP small -1, large 1. Without it: AP small
# 1, large -1. The AP over all sizes is 1 in both.
#
# Why it matters: the overall AP is right, so nothing looks wrong, while AP small, medium and large, which people
# compare between models, are those of another grouping: large objects are reported as "small".

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check faster-coco-eval==1.8.0 pycocotools==2.0.11 numpy==2.2.6 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import contextlib
import io

import faster_coco_eval
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def measure(reader, judge, **more):
    truth = reader()
    truth.dataset = {
        "images": [{"id": 1, "width": 640, "height": 480, "file_name": "1.jpg"}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 200, 200], "iscrowd": 0, **more}],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes([{"image_id": 1, "category_id": 1, "bbox": [10, 10, 200, 200], "score": 0.9}])
        run = judge(truth, found, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    names = ("all", None, None, "small", "medium", "large")
    return {name: round(float(v), 3) for name, v in zip(names, run.stats) if name}


fast = (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)
given, absent = measure(*fast, area=40000), measure(*fast)
print("faster-coco-eval with area", given)
print("faster-coco-eval without area", absent)
try:
    print("pycocotools without area", measure(COCO, COCOeval))
    refused = False
except KeyError as error:
    print("pycocotools without area: KeyError", error)
    refused = True
assert given == {"all": 1.0, "small": -1.0, "medium": -1.0, "large": 1.0}, "the plain case changed"
assert absent == {"all": 1.0, "small": 1.0, "medium": -1.0, "large": -1.0}, "an absent area is treated otherwise now"
assert refused, "pycocotools takes it now"
PY
