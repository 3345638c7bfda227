#!/usr/bin/env bash
# ray.cluster_utils.AutoscalingCluster reads a file that Ray's wheel lacks; with the file it first ends every Ray.
#
# Packages: ray[default] 2.60.0, Python 3.11.
#
# Behaviour: the class ("Create a local autoscaling cluster for testing") reads fake_multi_node/example.yaml beside
# Ray's modules. The file is in Ray's repository and not in its wheel. Given the file, start() runs the ray that is
# first on the PATH with "stop --force" before it starts a head: that ends all processes of Ray on the machine,
# whoever started them; shutdown() does so again.
#
# Seen: FileNotFoundError on construction. With a short file in its place and a ray on the PATH that only writes down
# how it is called: "stop --force", then "start --autoscaling-config=...".
#
# Why it matters: a test that follows the class's own documentation fails, and one that brings the file ends clusters
# of other tests and of other people on the same machine. The provider behind it can be had without the class: a head
# started with --autoscaling-config and provider {type: external, module: ...FakeMultiNodeProvider}.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check 'ray[default]==2.60.0' 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import os
import stat
import subprocess
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from ray.cluster_utils import AutoscalingCluster

NODE_TYPES = {"small": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1}}
try:
    AutoscalingCluster({"CPU": 0}, dict(NODE_TYPES))
except FileNotFoundError as error:
    missing = Path(error.filename)
print("it reads", missing.relative_to(Path(ray.__file__).parent.parent), "which the wheel does not have")
assert missing.name == "example.yaml" and not missing.exists()

# the file of Ray's repository, as far as the constructor reads it
missing.write_text("cluster_name: pretended\nmax_workers: 1\nprovider: {type: fake_multinode}\n")
recorder = Path("bin/ray")
recorder.parent.mkdir()
recorder.write_text('#!/bin/sh\necho "$@" >> calls.txt\n')
recorder.chmod(recorder.stat().st_mode | stat.S_IXUSR)
os.environ["PATH"] = f"{recorder.parent.resolve()}:{os.environ['PATH']}"
AutoscalingCluster({"CPU": 0}, dict(NODE_TYPES)).start()
first, second = Path("calls.txt").read_text().splitlines()
print("with the file, start() calls: ray", first)
print("                        then: ray", second)
assert first == "stop --force", first
assert second.startswith("start --autoscaling-config="), second
PY
echo "as described"
