#!/usr/bin/env bash
# In transformers' D-FINE and DEIMv2 the last decoder layer but one learns no boxes and no classes.
#
# Packages: transformers 5.24.0, torch 2.13.0, Python 3.11.
#
# Behaviour: in training the decoder returns the boxes and logits of L layers and, before them, those of the first
# layer's plain head: L + 1 entries. The distributions over box edges ("corners") have L entries. The loss pairs the
# lists with zip, from the first on: the plain head's boxes with the first layer's corners, the first layer's boxes
# with the second one's corners, and so on. The shorter list ends one entry early, so that the boxes and logits of
# layer L - 1 are in no loss; of the denoising queries it is the last layer that has none.
#
# Seen: gradients of the loss with respect to the boxes of each entry. D-FINE with four layers: non-zero for the
# plain head and layers 1, 2 and 4, exactly zero for layer 3. DEIMv2: the same. RT-DETRv2, which has one list: none
# is zero.
#
# Why it matters: fine-tuning works and converges, and the loss dictionary has a plausible number of entries
# (loss_bbox_aux_0, _1, ...). Nothing says that one layer is trained only through the layers after it, or that
# the IoU which weights a corner's loss is that of another layer's box.

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
from transformers import DFineConfig, Deimv2Config, HGNetV2Config, RTDetrResNetConfig, RTDetrV2Config

transformers.logging.set_verbosity_error()
LAYERS = 4
stages = ["stage2", "stage3", "stage4"]
hgnet = HGNetV2Config(
    stem_channels=[3, 8, 16], hidden_sizes=[24, 32, 48, 64], embedding_size=16, stage_in_channels=[16, 24, 32, 48],
    stage_mid_channels=[8, 8, 16, 16], stage_out_channels=[24, 32, 48, 64], stage_num_blocks=[1] * 4,
    stage_numb_of_layers=[1] * 4, out_features=stages,
)
resnet = RTDetrResNetConfig(
    embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1] * 4, layer_type="basic", out_features=stages
)
sizes = dict(
    encoder_hidden_dim=32, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4,
    decoder_attention_heads=4, decoder_layers=LAYERS, num_queries=20, num_denoising=0, num_labels=3,
    encoder_in_channels=[32, 48, 64], decoder_in_channels=[32, 32, 32],
)


def untrained_entries(config):
    """Entries of the decoder's list of boxes whose gradient is exactly zero."""
    torch.manual_seed(0)
    model = transformers.AutoModelForObjectDetection.from_config(config).train()
    labels = [{"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[.3, .4, .2, .3], [.7, .5, .3, .2]])}]
    kept = {}
    plain_loss = model.loss_function

    def loss_function(logits, labels, device, boxes, config, classes, coordinates, **rest):
        coordinates.retain_grad()
        kept["boxes"] = coordinates
        # the last entry also arrives by itself; give it from the same tensor
        return plain_loss(classes[:, -1], labels, device, coordinates[:, -1], config, classes, coordinates, **rest)

    model.loss_function = loss_function
    images = torch.rand(2, 3, 96, 96)
    model(pixel_values=images, labels=labels * 2).loss.backward()
    gradient = kept["boxes"].grad.abs().sum((0, 2, 3))
    return len(gradient), [index for index, size in enumerate(gradient) if size == 0]


found = {
    "D-FINE": untrained_entries(DFineConfig(backbone_config=hgnet, **sizes)),
    "DEIMv2": untrained_entries(Deimv2Config(backbone_config=hgnet, **sizes)),
    "RT-DETRv2": untrained_entries(RTDetrV2Config(backbone_config=resnet, **sizes)),
}
for name, (count, untrained) in found.items():
    print(f"{name}: {count} entries of boxes for {LAYERS} decoder layers, without any loss: {untrained}")
assert found["D-FINE"] == (LAYERS + 1, [LAYERS - 1]), "D-FINE learns otherwise now"
assert found["DEIMv2"] == (LAYERS + 1, [LAYERS - 1]), "DEIMv2 learns otherwise now"
assert found["RT-DETRv2"] == (LAYERS, []), "RT-DETRv2 learns otherwise now"
PY
