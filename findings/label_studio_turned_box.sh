#!/usr/bin/env bash
# A turned box leaves Label Studio's converter at the wrong place, and not at the same one in each format.
#
# Packages: label-studio-sdk 2.1.2, numpy 2.2.6, Python 3.11.
#
# Behaviour: a region with a rotation is a rectangle turned clockwise about its top left corner. Exported as COCO,
# the corners are turned while they are still percent of the image, so on an image that is not square the box gets
# the wrong shape (on a square one it is right). Exported as YOLO and as VOC, the turn is left out, so the box
# lies where the rectangle was before it was turned. No message tells of either.
#
# Seen: on an image of 100 x 80 a rectangle of 30 x 40 pixels at (50, 20), turned by 90 degrees, covers
# [10, 20, 50, 50]. COCO says [0, 20, 50, 44], YOLO and VOC say [50, 20, 80, 60], which has only an edge in common with it.
#
# Why it matters: people pick an export by the trainer that they use and expect the same boxes in each. Here the
# ground truth depends on the export, and a turned region trains or measures a detector at a place without object.

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


def export(width, height):
    """The box of the one region, as each of the three exports has it."""
    root = Path(f"{width}x{height}")
    (root / "pictures").mkdir(parents=True)
    Image.new("RGB", (width, height)).save(root / "pictures" / "a.png")
    region = {"id": "r1", "type": "rectanglelabels", "from_name": "label", "to_name": "image",
              "original_width": width, "original_height": height, "image_rotation": 0,
              "value": {"x": 5000 / width, "y": 2000 / height, "width": 3000 / width, "height": 4000 / height,
                        "rotation": 90, "rectanglelabels": ["cat"]}}
    task = {"id": 1, "data": {"image": "/data/upload/1/a.png"}, "predictions": [],
            "annotations": [{"id": 1, "completed_by": 1, "was_cancelled": False, "result": [region]}]}
    source = root / "tasks.json"
    source.write_text(json.dumps([task]))
    make = Converter(CONFIG, str(root), upload_dir=str(root / "pictures"), download_resources=False)
    make.convert_to_coco(str(source), str(root / "coco"), is_dir=False)
    make.convert_to_yolo(str(source), str(root / "yolo"), is_dir=False)
    make.convert_to_voc(str(source), str(root / "voc"), is_dir=False)
    x, y, w, h = json.loads((root / "coco/result.json").read_text())["annotations"][0]["bbox"]
    coco = [x, y, x + w, y + h]
    _, x, y, w, h = map(float, (root / "yolo/labels/a.txt").read_text().split())
    yolo = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
    text = (root / "voc/Annotations/a.xml").read_text()
    voc = [float(text.split(f"<{k}>")[1].split("<")[0]) for k in ("xmin", "ymin", "xmax", "ymax")]
    return [[round(v) for v in box] for box in (coco, yolo, voc)]


right = [10, 20, 50, 50]
wide, square = export(100, 80), export(100, 100)
print("the turned rectangle covers", right)
for place, boxes in (("100 x 80", wide), ("100 x 100", square)):
    print(place, dict(zip(("COCO", "YOLO", "VOC"), boxes)))
unturned = [50, 20, 80, 60]
assert wide == [[0, 20, 50, 44], unturned, unturned], "the exports changed"
assert square == [right, unturned, unturned], "the exports of a square image changed"
PY
