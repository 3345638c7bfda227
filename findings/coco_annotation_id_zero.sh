#!/usr/bin/env bash
# COCO annotations numbered from 0, as globox writes them, cost the first object its match in pycocotools.
#
# Packages: globox 2.9.0, pycocotools 2.0.11, faster-coco-eval 1.8.0, numpy 2.2.6, Python 3.11.
#
# Behaviour: pycocotools marks a matched detection with the id of its ground truth and takes 0 for "not matched".
# The object with id 0 is therefore never found: its exact detection counts as a false positive. Nothing is said.
# faster-coco-eval gives the same low number (with a warning). globox numbers annotations from 0.
#
# Seen: globox writes two boxes as COCO with ids 0 and 1; detections equal to the truth reach an AP of 0.252 and a
# recall of 0.5. With 1 added to the ids, and nothing else changed, both are 1.
#
# Why it matters: the file is valid, a reader never looks at ids, and on a large set the loss is one object, too
# small to notice. On a small test set, or with few objects in a class, it is points of AP. The score also sinks
# by more than one missed object would cost, because the detection becomes a false positive of a high score.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check globox==2.9.0 pycocotools==2.0.11 faster-coco-eval==1.8.0 numpy==2.2.6 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import contextlib
import copy
import io
import json
import warnings
from pathlib import Path

import faster_coco_eval
from globox import Annotation, AnnotationSet, BoundingBox
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

warnings.simplefilter("ignore")
boxes = {"a.jpg": (10, 10, 50, 50), "b.jpg": (20, 20, 70, 70)}
AnnotationSet([
    Annotation(name, (100, 80), [BoundingBox(label="cat", xmin=b[0], ymin=b[1], xmax=b[2], ymax=b[3])])
    for name, b in boxes.items()
]).save_coco(Path("zero.json"), auto_ids=True)
zero = json.loads(Path("zero.json").read_text())
one = copy.deepcopy(zero)
for annotation in one["annotations"]:
    annotation["id"] += 1
Path("one.json").write_text(json.dumps(one))


def measure(path, reader, judge):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = reader(path)
        exact = [{"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"],
                  "score": 0.9 - 0.1 * i} for i, a in enumerate(zero["annotations"])]
        run = judge(truth, truth.loadRes(exact), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return round(float(run.stats[0]), 3), round(float(run.stats[8]), 3)


ids = [a["id"] for a in zero["annotations"]]
first = measure("zero.json", COCO, COCOeval)
second = measure("one.json", COCO, COCOeval)
other = measure("zero.json", faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)
print("ids that globox wrote", ids)
print("pycocotools, AP and recall: ids from 0", first, "ids from 1", second)
print("faster-coco-eval, ids from 0", other)
assert ids == [0, 1], "globox numbers otherwise now"
assert first == (0.252, 0.5) and second == (1.0, 1.0), "pycocotools measures otherwise now"
assert other == (0.252, 0.5), "faster-coco-eval measures otherwise now"
PY
