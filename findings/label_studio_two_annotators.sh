#!/usr/bin/env bash
# Two annotators on one Label Studio task: COCO gets the picture twice, YOLO and VOC lose one annotator.
#
# Packages: label-studio-sdk 2.1.2, numpy 2.2.6, Python 3.11.
#
# Behaviour: the COCO export lists the one picture as two images, each with one annotator's boxes, both under the
# same file name. The YOLO and VOC exports write one file per picture and overwrite it, and the annotation that
# stays is the older one, not the newer. No message tells that answers were dropped.
#
# Seen: annotator 1 drew a cat on the left, annotator 2 later a dog on the right. COCO: 2 images named alike, one
# box each. YOLO and VOC: only the cat of annotator 1.
#
# Why it matters: overlap between annotators is how people measure label quality. Read as it stands, the COCO file
# puts one picture into a data set with two truths that contradict each other (each annotator's objects are
# background in the other's copy), and a split by image can put the copies into training and test at once.

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
Image.new("RGB", (100, 80)).save("pictures/a.png")


def answer(number, x, label):
    region = {"id": f"r{number}", "type": "rectanglelabels", "from_name": "label", "to_name": "image",
              "original_width": 100, "original_height": 80, "image_rotation": 0,
              "value": {"x": x, "y": 25, "width": 30, "height": 50, "rotation": 0, "rectanglelabels": [label]}}
    day = f"2024-01-0{number}T00:00:00Z"
    return {"id": number, "completed_by": number, "was_cancelled": False, "result": [region],
            "created_at": day, "updated_at": day}


task = {"id": 1, "data": {"image": "/data/upload/1/a.png"}, "predictions": [],
        "annotations": [answer(1, 10, "cat"), answer(2, 50, "dog")]}
Path("tasks.json").write_text(json.dumps([task]))
make = Converter(CONFIG, ".", upload_dir="pictures", download_resources=False)
make.convert_to_coco("tasks.json", "coco", is_dir=False)
make.convert_to_yolo("tasks.json", "yolo", is_dir=False)
make.convert_to_voc("tasks.json", "voc", is_dir=False)
coco = json.loads(Path("coco/result.json").read_text())
names = [i["file_name"].rsplit("/", 1)[-1] for i in coco["images"]]
owners = sorted(a["image_id"] for a in coco["annotations"])
lines = Path("yolo/labels/a.txt").read_text().split("\n")
words = Path("yolo/classes.txt").read_text().split()
yolo = [words[int(line.split()[0])] for line in lines if line]
text = Path("voc/Annotations/a.xml").read_text()
voc = [part.split("<")[0] for part in text.split("<object>")[1:] for part in part.split("<name>")[1:2]]
print("COCO images", names, "boxes on images", owners)
print("YOLO classes", yolo, "VOC classes", voc)
assert names == ["a.png", "a.png"] and owners == [0, 1], "the COCO export changed"
assert yolo == ["cat"] and voc == ["cat"], "the YOLO or VOC export changed"
PY
