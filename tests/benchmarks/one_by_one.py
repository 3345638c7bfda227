"""Label a folder one image at a time: ``python one_by_one.py URL FOLDER OUT``, with
autodistill's own loop where it is installed.

Prints which loop ran. The emulator counts.
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


class Service:
    """One connection, kept open; one blocking call per image."""

    def __init__(self, url: str) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc)

    def ask(self, image: bytes) -> list[dict[str, Any]]:
        question = {
            "image": {"b64": base64.b64encode(image).decode()},
            "classes": list(CLASSES),
            "threshold": 0.05,
        }
        self.connection.request(
            "POST",
            "/v1/detect",
            json.dumps(question),
            {"Content-Type": "application/json"},
        )
        detections: list[dict[str, Any]] = json.loads(
            self.connection.getresponse().read()
        )["detections"]
        return detections


def with_autodistill(url: str, folder: str, out: str) -> None:
    """Raises ImportError without autodistill."""
    import cv2
    import numpy as np
    import supervision  # type: ignore[import-not-found]
    from autodistill.detection import CaptionOntology, DetectionBaseModel  # type: ignore[import-not-found]

    class Cloud(DetectionBaseModel):  # type: ignore[misc]
        def __init__(self, ontology: Any) -> None:
            self.ontology = ontology
            self.service = Service(url)

        def predict(self, input: Any) -> Any:  # noqa: A002
            found = self.service.ask(cv2.imencode(".jpg", input)[1].tobytes())
            if not found:
                return supervision.Detections.empty()
            return supervision.Detections(
                xyxy=np.array([d["box"] for d in found], np.float32),
                confidence=np.array([d["score"] for d in found], np.float32),
                class_id=np.array([CLASSES.index(d["label"]) for d in found]),
            )

    Cloud(CaptionOntology({name: name for name in CLASSES})).label(
        folder, extension=".jpg", output_folder=out
    )


def plain_loop(url: str, folder: str, out: str) -> None:
    """The same without autodistill: answers are kept in memory and written at the end."""
    service = Service(url)
    answers = {
        file.name: service.ask(file.read_bytes())
        for file in sorted(Path(folder).glob("*.jpg"))
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "answers.json").write_text(json.dumps(answers))


def main() -> None:
    try:
        with_autodistill(*sys.argv[1:4])
        kind = "autodistill"
    except ImportError:
        plain_loop(*sys.argv[1:4])
        kind = "plain loop"
    print(f"\n{kind}")


if __name__ == "__main__":
    main()
