#!/usr/bin/env bash
# open_clip prepares images for weights given by path as OpenAI's, also for SigLIP, PE-Core and MobileCLIP.
#
# Packages: open_clip_torch 3.3.0, torch 2.14.1, torchvision 0.29.1, Python 3.11.
#
# Behaviour: mean, standard deviation, interpolation and resize mode belong to open_clip's pretrained tag, not to the
# architecture. With pretrained=PATH there is no tag, and the defaults are OpenAI's, without a word. The same file by
# its tag is prepared with mean 0.5 (SigLIP, PE-Core) or 0 (MobileCLIP), and squashed instead of cropped.
#
# Seen: MobileCLIP2-S0, random weights saved to a file and loaded by path: mean (0.481, 0.458, 0.408) where its tag
# dfndr2b has 0 and standard deviation 1, bicubic where the tag has bilinear.
#
# Why it matters: offline machines load weights by path. Zero-shot accuracy falls by points and nothing looks wrong:
# the model, the file and the code are the same.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check open_clip_torch==3.3.0 torch==2.14.1 torchvision==0.29.1 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import logging

import open_clip
import torch

logging.disable(logging.WARNING)
name = "MobileCLIP2-S0"
torch.save(open_clip.create_model(name).state_dict(), "weights.pt")
by_path = open_clip.get_model_preprocess_cfg(open_clip.create_model(name, pretrained="weights.pt"))
[tag] = open_clip.list_pretrained_tags_by_model(name)
by_tag = open_clip.get_pretrained_cfg(name, tag)
for key in ("mean", "std", "interpolation"):
    print(f"{key}: by path {by_path[key]}, by tag {tag} {by_tag[key]}")
    assert by_path[key] != by_tag[key], f"{key} now follows the architecture"
assert tuple(by_path["mean"]) == tuple(open_clip.OPENAI_DATASET_MEAN)
PY
