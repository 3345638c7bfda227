"""Local emulators of the detection services; ``app.py`` says how they work and how to add
one.
"""

from __future__ import annotations

from collections.abc import Mapping

from . import (
    anthropic,
    azure_vision,
    batches,
    dds,
    gemini,
    google_vision,
    hf_endpoint,
    openai_vlm,
    reference,
    rekognition,
    roboflow,
    roboflow_sam3,
)
from .app import Emulator, Fault, Provider, Reply, scene

PROVIDERS: Mapping[str, Provider] = {
    "dds": dds.answer,
    "google-vision": google_vision.answer,
    "rekognition": rekognition.answer,
    "azure-vision": azure_vision.answer,
    "hf-endpoint": hf_endpoint.answer,
    "roboflow": roboflow.answer,
    "roboflow-sam3": roboflow_sam3.answer,
    "openai-vlm": openai_vlm.serving("xyxy_1000"),
    "openai-vlm-yxyx": openai_vlm.serving("yxyx_1000"),
    "openai-vlm-pixels": openai_vlm.serving("xyxy_pixels"),
    "openai-vlm-ratio": openai_vlm.serving("xyxy_ratio"),
    "openai-vlm-percent": openai_vlm.serving("xyxy_percent"),
    "anthropic": anthropic.answer,
    "gemini": gemini.answer,
    "reference": reference.answer,
    "openai-batch": batches.openai(openai_vlm.serving("xyxy_1000")),
    "openrouter-batch": batches.openrouter(openai_vlm.serving("xyxy_1000")),
    "anthropic-batch": batches.answer_anthropic_jobs(anthropic.answer),
    "gemini-batch": batches.answer_gemini_jobs(gemini.answer),
}

__all__ = ["PROVIDERS", "Emulator", "Fault", "Reply", "scene"]
