#!/usr/bin/env bash
# Pillow's Image.resize(size, box=box) is not Image.crop(box).resize(size): it reads pixels outside the box.
#
# Packages: pillow 13.0.0, numpy 2.4.6, Python 3.11.
#
# Behaviour: the filter of resize(box=) takes its support from the whole image, so pixels up to one filter radius
# outside the box enter the edges of the result. crop() has no such pixels and renormalises the filter at its edge.
#
# Seen: a white box of 40 x 40 in a black image, enlarged to 80 x 80. By crop() every pixel stays 255; by resize(box=)
# the outermost pixels are 191 (bilinear) or 203 (bicubic).
#
# Why it matters: resize(box=) looks like the fast way to cut objects out for a classifier. What surrounds the object
# then leaks into the crop, and the pixels are not those of the two-step way that models are compared by.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check pillow==13.0.0 numpy==2.4.6 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import numpy as np
from PIL import Image

pixels = np.zeros((100, 100), np.uint8)
pixels[30:70, 30:70] = 255
image, box = Image.fromarray(pixels), (30, 30, 70, 70)
for name in ("BILINEAR", "BICUBIC"):
    resampling = Image.Resampling[name]
    two_steps = np.array(image.crop(box).resize((80, 80), resampling))
    one_step = np.array(image.resize((80, 80), resampling, box=box))
    print(f"{name}: crop then resize {two_steps[40, 0]}, resize with a box {one_step[40, 0]}")
    assert (two_steps == 255).all(), "crop() no longer keeps the outside out"
    assert one_step[40, 0] < 250, "resize(box=) no longer reads outside the box"
    assert one_step[40, 40] == 255
PY
