#!/usr/bin/env bash
# PyTorch's ONNX export stores equal weights once; the other layers get theirs through Identity nodes.
#
# Packages: torch 2.14.1, onnx 1.23.2, Python 3.11.
#
# Behaviour: torch.onnx.export (dynamo=False) merges parameters with equal values into one initializer. The first
# layer reads it directly, every other one the output of an Identity node on it, although the layers are separate
# parameters in PyTorch. With dynamo=True each layer has its own initializer.
#
# Seen: two 1 x 1 convolutions whose biases are both -4.6, as a detector's heads start with a prior of .01: one
# convolution has a third input that is an initializer, the other one's third input is made by an Identity node. After
# one of the biases changes in one element, both are initializers.
#
# Why it matters: whoever reads a detector's weights from its ONNX file, by the names of the initializers that a
# convolution takes, finds a weight and no bias for some of the heads, and none of it in a trained file in which the
# biases have moved apart: it works on the released model and fails, or drops the bias, on a fresh one.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.14.1 onnx==1.23.2 numpy 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import io
import warnings

import onnx
import torch
from torch import nn

warnings.simplefilter("ignore")


class Heads(nn.Module):
    """Two heads on one map, as of an anchor-free detector."""

    def __init__(self, changed):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)
        for head in (self.first, self.second):
            nn.init.constant_(head.bias, -4.6)
        if changed:
            self.second.bias.data[0] += 0.1

    def forward(self, features):
        return self.first(features), self.second(features)


def bias_sources(changed):
    """For each convolution: what its bias comes from."""
    buffer = io.BytesIO()
    torch.onnx.export(Heads(changed).eval(), (torch.zeros(1, 4, 8, 8),), buffer, dynamo=False)
    graph = onnx.load_from_string(buffer.getvalue()).graph
    initializers = {tensor.name for tensor in graph.initializer}
    makers = {node.output[0]: node.op_type for node in graph.node}
    biases = [node.input[2] for node in graph.node if node.op_type == "Conv"]
    return ["initializer" if name in initializers else makers[name] for name in biases]


equal, different = bias_sources(changed=False), bias_sources(changed=True)
print("biases of both heads equal:  ", equal)
print("one element of one different:", different)
assert sorted(equal) == ["Identity", "initializer"], equal
assert different == ["initializer", "initializer"], different
PY
echo "as described"
