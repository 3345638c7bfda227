#!/usr/bin/env bash
# Weighted boxes fusion takes one model's own overlapping boxes for agreement between models.
#
# Packages: ensemble-boxes 1.0.9, numpy 2.2.6, Python 3.11.
#
# Behaviour: weighted_boxes_fusion lowers the score of an object that only some of the models see, by (boxes in
# the group) / (models). It counts boxes, not models. If one model gives two overlapping boxes and the other none, the
# group has two boxes, and the score is not lowered at all. The option
# conf_type="absent_model_aware_avg" lowers it for the missing model, but still far less than for a single box.
#
# Seen: two models, the second sees nothing. One box of 0.9 becomes 0.45. The same box with a weaker copy of 0.8
# from the same model becomes 0.85, as if both models had agreed. A poorer answer thus nearly doubles the score.
# With conf_type="absent_model_aware_avg" the two boxes give 0.567.
#
# Why it matters: the fused score is meant to say how far the models agree. Detectors without suppression (DETR and its
# kind, language models, several prompts for one object) give near copies, and so win over two models
# that each see an object once with 0.8.

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
from ensemble_boxes import weighted_boxes_fusion

BOX = [0.1, 0.1, 0.5, 0.5]


def fuse(*models, **more):
    """The fused scores, of models that are each a list of scores for the one box."""
    result = weighted_boxes_fusion([[BOX] * len(m) for m in models], [list(m) for m in models],
                                   [[0] * len(m) for m in models], **more)
    return [round(float(score), 3) for score in result[1]]


single = fuse([0.9], [])
double = fuse([0.9, 0.8], [])
agreed = fuse([0.9], [0.8])
aware = fuse([0.9, 0.8], [], conf_type="absent_model_aware_avg")
print("one model of two, one box:", single)
print("one model of two, the box and a copy:", double)
print("both models, one box each:", agreed)
print("one model of two, the box and a copy, absent_model_aware_avg:", aware)
assert single == [0.45], "a lone box is scored otherwise now"
assert double == agreed == [0.85], "a model's own copy no longer counts as agreement"
assert aware == [0.567], "absent_model_aware_avg scores otherwise now"
PY
