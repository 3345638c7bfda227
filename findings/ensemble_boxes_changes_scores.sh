#!/usr/bin/env bash
# nms and soft_nms of ensemble-boxes overwrite the caller's scores when weights are given.
#
# Packages: ensemble-boxes 1.0.9, numpy 2.2.6, Python 3.11.
#
# Behaviour: called with weights, both functions multiply each model's scores by its share of the weights and put the
# product back into the list that the caller passed in. A second call with the same lists starts from
# the lowered scores. weighted_boxes_fusion and non_maximum_weighted, with the same signature, leave the lists alone.
#
# Seen: scores [[0.9], [0.8]] and weights [1, 3] are [[0.225], [0.6]] after nms, and weighted_boxes_fusion on
# the same lists then gives other scores than before.
#
# Why it matters: comparing fusion methods, or trying a list of thresholds in a loop, on one set of predictions is the
# usual use of this package. Each turn then measures scores that an earlier turn has scaled, the order
# of the tries decides the result, and the predictions that are stored afterwards are the scaled ones.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check --no-deps ensemble-boxes==1.0.9 numba==0.68.1 llvmlite==0.50.0 numpy==2.2.6 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import warnings

warnings.simplefilter("ignore")
import numpy
from ensemble_boxes import nms, non_maximum_weighted, soft_nms, weighted_boxes_fusion

BOXES = [[[0.1, 0.1, 0.5, 0.5]], [[0.6, 0.6, 0.9, 0.9]]]
LABELS = [[0], [0]]


def plain(values):
    return [[round(float(v), 3) for v in part] for part in values]


after = {}
for method in (nms, soft_nms, non_maximum_weighted, weighted_boxes_fusion):
    scores = [[0.9], [0.8]]
    method(BOXES, scores, LABELS, weights=[1, 3])
    after[method.__name__] = plain(scores)
    print(method.__name__, "leaves the caller's scores as", after[method.__name__])

scores = [[0.9], [0.8]]
before = weighted_boxes_fusion(BOXES, scores, LABELS)[1]
nms(BOXES, scores, LABELS, weights=[1, 3])
later = weighted_boxes_fusion(BOXES, scores, LABELS)[1]
print("weighted_boxes_fusion before", before.round(3).tolist(), "and after a call of nms", later.round(3).tolist())
changed = [[0.225], [0.6]]
assert after["nms"] == after["soft_nms"] == changed, "nms or soft_nms leaves the scores alone now"
assert after["weighted_boxes_fusion"] == after["non_maximum_weighted"] == [[0.9], [0.8]], "the others changed"
assert not numpy.allclose(before, later), "the second call is the same now"
PY
