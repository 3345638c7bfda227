#!/usr/bin/env bash
# Without a default route Ray takes 127.0.0.1 for the address of its node, though the machine has another one.
#
# Packages: ray 2.60.0, Python 3.11. Needs Linux with iproute2 and util-linux, and root or user namespaces.
#
# Behaviour: Ray asks the system which address it would use to reach a name server of the internet (8.8.8.8; nothing
# is sent). A machine on a closed network has no route there, and Ray then resolves its own host name, which is often
# 127.0.0.1 or 127.0.1.1, instead of taking the address of its interface.
#
# Seen: a network namespace with one interface, 10.9.8.7/24: Ray says 127.0.0.1. With a default route, to a gateway
# that does not exist: 10.9.8.7.
#
# Why it matters: on machines of a closed network a head registers as 127.0.0.1 and tells that address to nodes and
# drivers: nodes that join are never found. Every ray start there needs --node-ip-address.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check 'ray==2.60.0' 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
command -v unshare >/dev/null && command -v ip >/dev/null || { echo "needs unshare and ip" >&2; exit 3; }
cat >address.py <<'PY'
import ray.util

print(ray.util.get_node_ip_address())
PY
unshare --user --map-root-user --net --uts sh -c '
    hostname localhost
    ip link set lo up
    ip link add lan type veth peer name far
    ip address add 10.9.8.7/24 dev lan
    ip link set lan up
    ip link set far up
    venv/bin/python address.py >without 2>>log
    ip route add default via 10.9.8.1
    venv/bin/python address.py >with 2>>log
' || { cat log >&2; exit 3; }
echo "without a default route: $(cat without); with one: $(cat with)"
[ "$(cat without)" = 127.0.0.1 ] && [ "$(cat with)" = 10.9.8.7 ]
echo "as described"
