"""python detect.py [FILE.onnx] IMAGE [...]: objects in images, by model.onnx or FILE
beside this. Needs onnxruntime, numpy and pillow.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def load(name: str = "model.onnx") -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        Path(__file__).with_name(name), providers=["CPUExecutionProvider"]
    )


def detect(
    session: onnxruntime.InferenceSession, image: Image.Image, score_min: float = 0.3
) -> list[tuple[str, float, list[float]]]:
    """(class, score, [x0, y0, x1, y1] in pixels) of each object, best first; ``image``:
    PIL.
    """
    classes = session.get_modelmeta().custom_metadata_map["classes"].split("\n")
    pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]
    boxes, scores, labels, _image, _probs = session.run(None, {"images": pixels})
    found = zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
    return [
        (classes[label], score, box)
        for box, score, label in found
        if score >= score_min
    ]


if __name__ == "__main__":
    given = sys.argv[1:] or sys.exit(__doc__)
    session = load(given.pop(0)) if given[0].endswith(".onnx") else load()
    for path in given:
        print(path)
        for found, score, box in detect(session, Image.open(path)):
            print(f"  {found:<20} {score:.3f}  {[round(v, 1) for v in box]}")
