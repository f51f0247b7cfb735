#!/bin/sh
# Copies to /opt/rest what came into the environment since torch.sh: a layer of its own, so that a change of
# DeepSpeed or of a package travels without the gigabytes of torch.
set -eu
if [ "$FLAVOUR" = cuda ]; then
    mkdir -p /opt/venv/share/launcher
    DS_ACCELERATOR=cuda CUDA_HOME=/opt/venv/cuda \
        python3 /launcher/architectures.py >/opt/venv/share/launcher/architectures.txt
    if [ -z "${TOOLKIT:-}" ]; then
        sh /launcher/toolkit.sh remove
    fi
fi
python3 -m pip check

# An engine keeps whole seconds of the times in a layer.
seconds() { sed -E 's/\.[0-9]+\t([^\t]*)$/\t\1/'; }
seconds </launcher/torch.files >/launcher/torch.seconds
mkdir /opt/rest
sh /launcher/files.sh | seconds | LC_ALL=C comm -13 /launcher/torch.seconds - | cut -f 1 |
    tar --create --directory /opt/venv --no-recursion --verbatim-files-from --files-from - |
    tar --extract --directory /opt/rest
