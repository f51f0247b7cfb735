#!/bin/sh
# The first process of a laboratory node: keeps sshd and dockerd running, ends both on SIGTERM.
# While /lab/hold-engine exists dockerd stays down: that is a fault, asked for by a test.
set -eu

for user in ml nodocker; do
    install -d -m 700 -o "$user" -g "$user" "/home/$user/.ssh"
    printf '%s\n' "$LAB_AUTHORIZED_KEY" >"/home/$user/.ssh/authorized_keys"
    chown "$user:$user" "/home/$user/.ssh/authorized_keys"
    chmod 600 "/home/$user/.ssh/authorized_keys"
done
chown ml:ml /mnt/nvme /mnt/checkpoints

if [ ! -e /etc/ssh/ssh_host_ed25519_key ]; then
    ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key
fi
mkdir -p /run/sshd

# Left over when the node was killed and not stopped; with them neither daemon would start again.
rm -rf /run/docker* /run/containerd

end() {
    trap - TERM INT
    kill "$sshd" "$engine" 2>/dev/null || true
    wait "$engine" 2>/dev/null || true
    exit 0
}
engine() {
    # shellcheck disable=SC2064  # the shell below is asked for its child when it is told to end
    trap 'kill "$dockerd" 2>/dev/null; wait "$dockerd"; exit 0' TERM
    while :; do
        if [ ! -e /lab/hold-engine ]; then
            dockerd --storage-driver overlay2 --log-level error &
            dockerd=$!
            wait "$dockerd" || true
            rm -f /run/docker.pid
        fi
        sleep 0.5
    done
}

/usr/sbin/sshd -D -e &
sshd=$!
engine &
engine=$!
trap end TERM INT
wait "$engine"
