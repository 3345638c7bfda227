"""python detect.py IMAGE [...]: objects in images, by model.onnx beside this file. Needs onnxruntime, numpy and pillow."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(Path(__file__).with_name("model.onnx"), providers=["CPUExecutionProvider"])
classes = session.get_modelmeta().custom_metadata_map["classes"].split("\n")


def detect(image: Image.Image, score_min: float = 0.3) -> list[tuple[str, float, list[float]]]:
    """(class, score, [x0, y0, x1, y1] in pixels) of each object, best first; ``image``: PIL."""
    pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]
    boxes, scores, labels, _image, _probs = session.run(None, {"images": pixels})
    found = zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
    return [(classes[label], score, box) for box, score, label in found if score >= score_min]


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(path)
        for name, score, box in detect(Image.open(path)):
            print(f"  {name:<20} {score:.3f}  {[round(v, 1) for v in box]}")
