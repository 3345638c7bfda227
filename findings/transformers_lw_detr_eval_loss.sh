#!/usr/bin/env bash
# The loss of LW-DETR and RF-DETR in evaluation mode is not that of training mode: it splits the queries once more.
#
# Packages: transformers 5.24.0, torch 2.13.0, Python 3.11.
#
# Behaviour: in training these models have 13 groups of queries ("group_detr"), each matched to all boxes; in
# evaluation mode they have one. The loss decides by its own training flag, and since it is made anew in each call
# and never told, it always takes 13 groups. In evaluation mode it cuts the one group of 300 into pieces of 23, matches
# every box in each of them and divides by 13 times the boxes: good predictions are asked to miss 12 times of 13.
#
# Seen: 26 queries that predict both boxes of an image exactly, and background elsewhere, have an evaluation loss of
# boxes (L1) of .97 with 13 groups. With group_detr = 1 in the configuration, nothing else changed: 0.
#
# Why it matters: this is the validation loss that a Trainer reports and by which it picks the best checkpoint and
# stops early. It falls in the beginning and looks plausible, but it cannot reach what it measures: the better
# one query is, the more the other twelve are at fault for not being there too.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check transformers==5.24.0 torch==2.13.0 scipy pillow 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import LwDetrConfig, LwDetrViTConfig, RfDetrConfig, RfDetrDinov2Config

transformers.logging.set_verbosity_error()
hidden = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=96, out_indices=[2, 4])
sizes = dict(
    d_model=32, decoder_layers=1, decoder_ffn_dim=32, decoder_self_attention_heads=4, decoder_cross_attention_heads=4,
    decoder_n_points=2, num_queries=26, num_labels=3, dropout=0.0,
)
configs = {
    "LW-DETR": LwDetrConfig(
        backbone_config=LwDetrViTConfig(pretrain_image_size=96, window_block_indices=[0, 2], num_windows=4, **hidden),
        projector_scale_factors=[1.0], **sizes,
    ),
    "RF-DETR": RfDetrConfig(backbone_config=RfDetrDinov2Config(patch_size=16, num_windows=2, **hidden), **sizes),
}
boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.5, 0.3, 0.2]])
labels = [{"class_labels": torch.tensor([0, 2]), "boxes": boxes}]
predicted = torch.full((1, 26, 4), 0.1)
predicted[0, :2] = boxes
logits = torch.full((1, 26, 3), -9.0)
logits[0, 0, 0] = logits[0, 1, 2] = 9.0


def box_loss(model, groups):
    """The L1 loss of exact predictions, by the model's own loss in evaluation mode."""
    model.config.group_detr = groups
    _, parts, _ = model.eval().loss_function(
        logits, labels, "cpu", predicted, model.config, logits[None], predicted[None], logits, predicted
    )
    return round(float(parts["loss_bbox"]), 2)


found = {}
for name, config in configs.items():
    model = transformers.AutoModelForObjectDetection.from_config(config)
    found[name] = box_loss(model, 13), box_loss(model, 1)
    print(f"{name}: L1 loss of exact predictions in evaluation mode {found[name][0]}, with one group {found[name][1]}")
assert all(thirteen > 0.3 and one == 0 for thirteen, one in found.values()), "they have another evaluation loss now"
PY
