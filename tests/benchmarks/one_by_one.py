"""Label a folder one image at a time: ``python one_by_one.py URL FOLDER OUT``, with
autodistill's own loop where it is installed.

Prints which loop ran; the emulator counts the calls.
"""

from __future__ import annotations

import base64
import http.client
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CLASSES = ("car", "bus", "dog")


class CloudConnection:
    """A connection that stays open, with one blocking call per image."""

    def __init__(self, url: str) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc)

    def detect(self, image: bytes) -> list[dict[str, Any]]:
        request = {
            "image": {"b64": base64.b64encode(image).decode()},
            "classes": list(CLASSES),
            "threshold": 0.05,
        }
        self.connection.request(
            "POST",
            "/v1/detect",
            json.dumps(request),
            {"Content-Type": "application/json"},
        )
        detections: list[dict[str, Any]] = json.loads(
            self.connection.getresponse().read()
        )["detections"]
        return detections


def label_with_autodistill(url: str, folder: str, out: str) -> None:
    """Label the folder with autodistill. Raises ImportError if it is not installed."""
    import cv2
    import numpy as np
    import supervision  # type: ignore[import-not-found]
    from autodistill.detection import (  # type: ignore[import-not-found]
        CaptionOntology,
        DetectionBaseModel,
    )

    class Cloud(DetectionBaseModel):  # type: ignore[misc]
        def __init__(self, ontology: Any) -> None:
            self.ontology = ontology
            self.connection = CloudConnection(url)

        def predict(self, input: Any) -> Any:
            detections = self.connection.detect(
                cv2.imencode(".jpg", input)[1].tobytes()
            )
            if not detections:
                return supervision.Detections.empty()
            return supervision.Detections(
                xyxy=np.array([d["box"] for d in detections], np.float32),
                confidence=np.array([d["score"] for d in detections], np.float32),
                class_id=np.array([CLASSES.index(d["label"]) for d in detections]),
            )

    Cloud(CaptionOntology({name: name for name in CLASSES})).label(
        folder, extension=".jpg", output_folder=out
    )


def label_in_plain_loop(url: str, folder: str, out: str) -> None:
    """Label the folder without autodistill; answers stay in memory until the end."""
    connection = CloudConnection(url)
    answers = {
        file.name: connection.detect(file.read_bytes())
        for file in sorted(Path(folder).glob("*.jpg"))
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "answers.json").write_text(json.dumps(answers))


def main() -> None:
    try:
        label_with_autodistill(*sys.argv[1:4])
        kind = "autodistill"
    except ImportError:
        label_in_plain_loop(*sys.argv[1:4])
        kind = "plain loop"
    print(f"\n{kind}")


if __name__ == "__main__":
    main()
