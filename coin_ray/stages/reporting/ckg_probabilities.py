"""What the trained fusion network (CKG_FILE) says of the cloud's boxes in the test images. A
diagnosis: nothing is trained or chosen by it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from coin_ray import boxes as box_ops
from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.data.augmentation import resize_to_fit
from coin_ray.data.canonical import decode_rgb
from coin_ray.fusion.ckg import ConsistentKnowledge
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone, starting_embeddings
from coin_ray.models.prototypes import Prototypes
from coin_ray.runs.steps import Context
from coin_ray.stages.common.students import new_student
from coin_ray.stages.common.teacher_outputs import prepare_cloud_for_separation
from coin_ray.stages.common.training_job import load_weights
from coin_ray.stages.evaluate import PredictionsByMethod
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.structures import Detections

CKG_FILE = "ckg.pt"
"""In the distillation's folder: state of ``combine_fusion_modules``."""
IMAGES = 100
"""At most so many are looked at, evenly spread."""


def predict_ckg_probabilities(
    context: Context[PipelineConfig], images: list[dict[str, object]], answers: PredictionsByMethod
) -> dict[str, Tensor]:
    """CKG's probabilities [N, K+1] of the cloud's boxes above the training threshold,
    by image id; empty if the run has no trained CKG_FILE.
    """
    path = storage.join(context.inputs["distill"], CKG_FILE)
    config = context.config
    if (
        config.distill.fusion != "ckg"
        or "clip_labels" not in answers
        or not storage.exists(path)
    ):
        return {}
    look = _Fusion(config, storage.join(context.inputs["distill"], WEIGHTS), path)
    known = [
        i
        for i in images
        if i["image_id"] in answers["cloud"] and i["image_id"] in answers["clip_labels"]
    ]
    chosen = [
        known[n * len(known) // min(IMAGES, len(known))]
        for n in range(min(IMAGES, len(known)))
    ]
    return {
        i: look(str(row["uri"]), answers["cloud"][i], answers["clip_labels"][i])
        for row in chosen
        if (i := str(row["image_id"]))
    }


def combine_fusion_modules(ckg: nn.Module, cloud: nn.Module, clip: nn.Module) -> nn.ModuleDict:
    """CKG and the two banks of prototypes it attends to, as one module with one state."""
    return nn.ModuleDict(
        {"ckg": ckg, "cloud_prototypes": cloud, "clip_prototypes": clip}
    )


class _Fusion:
    def __init__(self, config: PipelineConfig, student: str, ckg: str) -> None:
        backbone = load_backbone(config)
        self.config = config
        self.student = new_student(backbone, config, seed=config.seed)
        self.student.load_state_dict(load_weights(student))
        embeddings = starting_embeddings(backbone, config)
        self.ckg = ConsistentKnowledge(
            embeddings.shape[1], len(config.classes), config.distill.ckg_heads
        )
        banks = Prototypes(embeddings), Prototypes(embeddings)
        combine_fusion_modules(self.ckg, *banks).load_state_dict(load_weights(ckg))
        self.device = torch.device(
            "cuda" if config.distill.fit.gpu and torch.cuda.is_available() else "cpu"
        )
        self.student.to(self.device).eval()
        self.ckg.to(self.device)
        self.prototypes = (
            banks[0].to(self.device).normalised(),
            banks[1].to(self.device).normalised(),
        )

    @torch.no_grad()
    def __call__(self, uri: str, cloud: Detections, clip: Detections) -> Tensor:
        used = cloud.scores >= self.config.labels.score_min
        if not used.any():
            return cloud.probs[used]
        original = pil_to_tensor(decode_rgb(storage.read_bytes(uri)))
        view = resize_to_fit(
            original, self.config.detector.short_side, self.config.detector.long_side
        )
        boxes = box_ops.scale_boxes(
            cloud.boxes[used],
            view.shape[2] / original.shape[2],
            view.shape[1] / original.shape[1],
        )
        shared, _ = self.student.propose(self.student.prepare([view]))
        embedded = self.student.describe(shared, [boxes.to(self.device)]).embedded  # type: ignore[arg-type]
        said = prepare_cloud_for_separation(cloud, self.config.labels).probs
        fused: Tensor = self.ckg(
            embedded,
            self.prototypes,
            said.to(self.device),
            clip.probs[used].to(self.device),
        )
        return fused.cpu()
