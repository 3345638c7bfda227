#!/usr/bin/env bash
# Datumaro reads a COCO crowd box and writes it back to COCO as an ordinary object.
#
# Packages: datumaro 1.13.12, Python 3.11.
#
# Behaviour: an annotation with "iscrowd": 1 and only a box (no segmentation, as in data sets for detection) is read
# with the attribute is_crowd true. The COCO writer gives it "iscrowd": 0. It looks as if the flag were carried,
# since a crowd with a run-length mask keeps its 1. There is a warning when the same data goes to YOLO or VOC, but
# none when it goes to COCO, the one format that could have held it.
#
# Seen: two crowd annotations, one with a box alone and one with a mask: read, both say is_crowd true; written,
# they have iscrowd 0 and 1.
#
# Why it matters: reading and writing again (to filter, split or merge a set) turns regions to be ignored
# into objects. A measure then counts each as one missed object and the detections inside as wrong, and a trainer
# learns one box around a whole crowd.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check datumaro==1.13.12 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json
import logging
from pathlib import Path

import datumaro
from PIL import Image

logging.disable(logging.CRITICAL)
Path("in/annotations").mkdir(parents=True)
Path("in/images/train").mkdir(parents=True)
Image.new("RGB", (100, 80)).save("in/images/train/a.jpg")
counts = [10 * 80 + 20] + [40, 40] * 29 + [40, 20 + 60 * 80]  # runs of 0 and 1, down each column
assert sum(counts) == 100 * 80
box = {"image_id": 1, "category_id": 1, "bbox": [10, 20, 30, 40], "area": 1200}
Path("in/annotations/instances_train.json").write_text(json.dumps({
    "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}],
    "categories": [{"id": 1, "name": "person"}],
    "annotations": [
        {**box, "id": 1, "iscrowd": 1},
        {**box, "id": 2, "iscrowd": 1, "segmentation": {"size": [80, 100], "counts": counts}},
        {**box, "id": 3, "iscrowd": 0},
    ],
}))
data = datumaro.Dataset.import_from("in", "coco_instances")
read = {}
for item in data:
    for annotation in item.annotations:
        read[annotation.id] = bool(annotation.attributes["is_crowd"])
data.export("out", "coco_instances")
written = json.loads(Path("out/annotations/instances_train.json").read_text())["annotations"]
back = {a["id"]: a["iscrowd"] for a in written}
print("read as crowd:", dict(sorted(read.items())))
print("iscrowd when written (1 is the box alone, 2 has a mask, 3 is an object):", dict(sorted(back.items())))
assert read == {1: True, 2: True, 3: False}, "the reader changed"
assert back == {1: 0, 2: 1, 3: 0}, "the writer changed"
PY
