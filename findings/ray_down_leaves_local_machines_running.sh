#!/usr/bin/env bash
# `ray down` of machines of one's own says "No nodes remaining" and ends with 0 while all of them go on running.
#
# Packages: ray[default] 2.60.0, Python 3.11.
#
# Behaviour: with provider type local, `ray down` sends a bare `ray stop` to the head's login shell. Where Ray lies in
# an environment that only the start commands of the file name, that is "command not found", which is a warning.
# What follows, "Terminating node" for each machine and "No nodes remaining", is written into a file of the machine
# on which it runs: no worker gets a command.
#
# Seen, with an ssh that notes what it is asked and runs it here with an empty environment: one command, `ray stop`
# to the head, none to the worker; "ray: command not found"; "No nodes remaining."; exit status 0; the head's port
# still answers.
#
# Why it matters: the cluster keeps its GPUs, its jobs and the secrets of their environment, and nobody looks there
# again. It takes an environment that login shells activate, and workers that end when their head does.

set -euo pipefail
folder=$(mktemp -d)
name=finding-$$
finish() {
    pkill -KILL -f "$folder/venv" || true
    sleep 2
    rm -rf "$folder" "/tmp/ray/cluster-$name.state" "/tmp/ray/cluster-$name.lock"
}
trap finish EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check 'ray[default]==2.60.0' 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
mkdir bin
cat >bin/ssh <<'SSH'
#!/usr/bin/env bash
while [[ $1 == -* ]]; do
    [[ $1 == -o || $1 == -i ]] && shift
    shift
done
host=${1#*@}
shift
printf '%s: %s\n' "$host" "$*" >>"$FOLDER/ssh.log"
exec env -i HOME="$FOLDER" PATH=/usr/bin:/bin sh -c "$*"
SSH
printf '#!/usr/bin/env bash\n' >bin/rsync
chmod +x bin/*
export FOLDER="$folder" HOME="$folder" PATH="$folder/bin:$folder/venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
cat >cluster.yaml <<YAML
cluster_name: $name
provider: {type: local, head_ip: 127.0.0.1, worker_ips: [127.0.0.2]}
auth: {ssh_user: me}
max_workers: 1
head_start_ray_commands:
  - >-
    RAY_AUTH_MODE=disabled $folder/venv/bin/ray start --head --port=$port --num-cpus=1 --include-dashboard=false
    --object-store-memory=100000000
worker_start_ray_commands: []
YAML
ray up cluster.yaml --yes --no-config-cache >up.log 2>&1 || { cat up.log >&2; exit 3; }
: >ssh.log
status=0
ray down cluster.yaml --yes >down.log 2>&1 || status=$?
answers=no
python -c "import socket; socket.create_connection(('127.0.0.1', $port))" && answers=yes
commands=$(sed 's/: .*(\(.*\)).*/: \1/' ssh.log)
printf 'commands:\n%s\nexit status %s, the head answers: %s\n' "$commands" "$status" "$answers"
grep -o 'ray: command not found\|No nodes remaining\.' down.log
[ "$commands" = "127.0.0.1: ray stop" ]
grep -q 'ray: command not found' down.log
grep -q 'Terminating node' down.log
grep -q 'No nodes remaining' down.log
[ "$status" = 0 ]
[ "$answers" = yes ]
echo "as described"
