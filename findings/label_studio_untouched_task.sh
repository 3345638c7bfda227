#!/usr/bin/env bash
# A Label Studio task that nobody has labelled is exported as an image without objects.
#
# Packages: label-studio-sdk 2.1.2, numpy 2.2.6, Python 3.11.
#
# Behaviour: the converter writes a task whose list of annotations is empty (it may hold a model's prediction with
# a box) into COCO as an image without annotations and without a size, and into YOLO as an empty text file. That is
# exactly how both formats say "a person looked and found nothing". VOC leaves the task out. A task that an
# annotator skipped on purpose is, the other way round, left out everywhere.
#
# Seen: of two tasks, one with a box and one untouched, COCO lists two images (the second with width null),
# YOLO has two text files (the second of 0 bytes), VOC has one XML file.
#
# Why it matters: a full export in the middle of a labelling round (all tasks, not only the finished ones) turns the
# whole unlabelled rest into background for training, and its true detections into false ones for the measure.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check --no-deps annotated-types==0.8.0 anyio==4.16.0 appdirs==1.4.4 certifi \
    charset-normalizer==3.5.3 click==8.5.1 defusedxml==0.7.1 h11==0.16.0 httpcore==1.0.9 httpx==0.28.1 idna==3.20 \
    ijson==3.6.0 joblib==1.6.0 label-studio-sdk==2.1.2 lxml==6.1.3 nltk==3.10.4 numpy==2.2.6 pandas==3.1.1 \
    pillow==13.0.0 pydantic==2.14.4 pydantic_core==2.50.5 PyJWT==2.13.0 python-dateutil==4.0.0 regex==2026.11.19 \
    requests==2.34.2 six==1.17.0 tqdm==4.70.1 typing-inspection==0.4.5 typing_extensions==4.16.0 ujson==6.1.0 \
    urllib3==2.8.0 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json
import logging
from pathlib import Path

from label_studio_sdk.converter import Converter
from PIL import Image

logging.disable(logging.CRITICAL)
CONFIG = """<View><Image name="image" value="$image"/>
<RectangleLabels name="label" toName="image"><Label value="cat"/><Label value="dog"/></RectangleLabels></View>"""

Path("pictures").mkdir()
for name in "ab":
    Image.new("RGB", (100, 80)).save(f"pictures/{name}.png")
region = {"id": "r1", "type": "rectanglelabels", "from_name": "label", "to_name": "image",
          "original_width": 100, "original_height": 80, "image_rotation": 0,
          "value": {"x": 10, "y": 25, "width": 30, "height": 50, "rotation": 0, "rectanglelabels": ["cat"]}}
tasks = [
    {"id": 1, "data": {"image": "/data/upload/1/a.png"}, "predictions": [],
     "annotations": [{"id": 1, "completed_by": 1, "was_cancelled": False, "result": [region]}]},
    {"id": 2, "data": {"image": "/data/upload/1/b.png"}, "annotations": [],
     "predictions": [{"id": 1, "score": 0.9, "result": [region]}]},
]
Path("tasks.json").write_text(json.dumps(tasks))
make = Converter(CONFIG, ".", upload_dir="pictures", download_resources=False)
make.convert_to_coco("tasks.json", "coco", is_dir=False)
make.convert_to_yolo("tasks.json", "yolo", is_dir=False)
make.convert_to_voc("tasks.json", "voc", is_dir=False)
coco = json.loads(Path("coco/result.json").read_text())
images = [(i["file_name"].rsplit("/", 1)[-1], i["width"]) for i in coco["images"]]
boxes = [a["image_id"] for a in coco["annotations"]]
texts = {p.name: p.stat().st_size for p in sorted(Path("yolo/labels").iterdir())}
files = sorted(p.name for p in Path("voc/Annotations").iterdir())
print("COCO images and widths", images, "boxes on images", boxes)
print("YOLO text files and bytes", texts)
print("VOC files", files)
assert images == [("a.png", 100), ("b.png", None)] and boxes == [0], "the COCO export changed"
assert list(texts) == ["a.txt", "b.txt"] and texts["a.txt"] > 0 == texts["b.txt"], "the YOLO export changed"
assert files == ["a.xml"], "the VOC export changed"
PY
