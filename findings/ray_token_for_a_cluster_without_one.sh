#!/usr/bin/env bash
# A driver of Ray that sends a token to a cluster without one connects and runs tasks, but no actor of it ever starts.
#
# Packages: ray[default] 2.60.0, Python 3.11.
#
# Behaviour: with RAY_AUTH_MODE=token and a token at hand, ray.init(address=...) of a cluster that was started with
# RAY_AUTH_MODE=disabled raises nothing. Tasks run. Every actor ends with ActorDiedError whose cause is "all references
# to the actor were removed"; the word token isn't in it. A process that started a local Ray is such a driver too:
# ray.init() without an address sets RAY_AUTH_MODE=token for good, and neither ray.shutdown() nor setting the variable
# to "disabled" afterwards takes that back.
#
# Seen: mode disabled: task 1, actor 2. Mode token: task 1, actor ActorDiedError. First a local Ray, then disabled:
# task 1, actor ActorDiedError.
#
# Why it matters: whoever has `export RAY_AUTH_MODE=token` in a shell profile, or tests that use a local Ray and then a
# cluster, searches for a reference that is lost. Ray Data reports it as a pool whose actors die while they start.

set -euo pipefail
folder=$(mktemp -d)
head=
finish() {
    if [ -n "$head" ]; then kill "$head" && wait "$head" || true; fi
    rm -rf "$folder"
}
trap finish EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check 'ray[default]==2.60.0' 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
export RAY_USAGE_STATS_ENABLED=0 RAY_raylet_start_wait_time_s=300 HOME="$folder" PATH="$folder/venv/bin:$PATH"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
RAY_AUTH_MODE=disabled ray start --head --block --port="$port" --num-cpus=2 --include-dashboard=false \
    --object-store-memory=100000000 >start.log 2>&1 &
head=$!
until python -c "import socket; socket.create_connection(('127.0.0.1', $port))" 2>/dev/null; do
    kill -0 "$head" 2>/dev/null || { cat start.log >&2; exit 3; }
    sleep 1
done
cat >driver.py <<'PY'
import logging
import os
import sys

import ray

quiet = {"logging_level": logging.CRITICAL, "log_to_driver": False}
if sys.argv[2] == "local first":
    ray.init(address="local", num_cpus=1, include_dashboard=False, **quiet)
    ray.shutdown()
    os.environ["RAY_AUTH_MODE"] = "disabled"
ray.init(address=f"127.0.0.1:{sys.argv[1]}", **quiet)


@ray.remote
def task():
    return 1


@ray.remote
class Actor:
    def answer(self):
        return 2


actor = Actor.remote()
try:
    answer = ray.get(actor.answer.remote(), timeout=120)
except ray.exceptions.RayError as error:
    assert "all references to the actor were removed" in str(error), error
    assert "token" not in str(error).lower(), error
    answer = type(error).__name__
print(f"task {ray.get(task.remote(), timeout=120)}, actor {answer}")
PY
disabled=$(RAY_AUTH_MODE=disabled python driver.py "$port" "" 2>>log)
token=$(RAY_AUTH_MODE=token python driver.py "$port" "" 2>>log)
after_local=$(env -u RAY_AUTH_MODE python driver.py "$port" "local first" 2>>log)
printf 'mode disabled: %s\nmode token: %s\nfirst a local Ray, then disabled: %s\n' "$disabled" "$token" "$after_local"
[ "$disabled" = "task 1, actor 2" ]
[ "$token" = "task 1, actor ActorDiedError" ]
[ "$after_local" = "task 1, actor ActorDiedError" ]
echo "as described"
