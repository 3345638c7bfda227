"""python detect.py [MODEL.onnx] IMAGE ...: needs onnxruntime, numpy and pillow."""

import sys
from pathlib import Path

from onnxruntime import InferenceSession
from PIL import Image

from coin_ray.data.pixels import model_input


def detect(
    session: InferenceSession, image: Image.Image, score_min: float = 0.3
) -> list[tuple[str, float, list[float]]]:
    """Return (class, score, [x0, y0, x1, y1] in upright pixels), best first."""
    metadata = session.get_modelmeta().custom_metadata_map
    classes = metadata["classes"].split("\n")
    pixels = model_input(image, metadata)
    boxes, scores, labels, _, _ = session.run(None, {"images": pixels})
    rows = zip(labels.tolist(), scores.tolist(), boxes.tolist(), strict=True)
    return [(classes[k], score, box) for k, score, box in rows if score >= score_min]


if __name__ == "__main__":
    names = sys.argv[1:] or sys.exit(__doc__)
    model = names.pop(0) if names[0].endswith(".onnx") else "model.onnx"
    path = Path(__file__).with_name(model)
    model_session = InferenceSession(path, providers=["CPUExecutionProvider"])
    for name in names:
        print(name)
        for label, score, box in detect(model_session, Image.open(name)):
            print(f"  {label:<20} {score:.3f}  {[round(x, 1) for x in box]}")
