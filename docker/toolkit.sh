#!/bin/sh
# The CUDA compiler for DeepSpeed's ops, under /opt/venv/cuda: the base's own where it fits this torch, or else from
# PyPI into the folder where torch already keeps the CUDA libraries.
#
#   toolkit.sh add|remove
set -eu
[ "$FLAVOUR" = cuda ] || exit 0

if [ "$1" = remove ]; then
    rm /opt/venv/cuda
    if [ -e /launcher/links.txt ]; then
        xargs rm </launcher/links.txt
        grep -o '^[a-z0-9-]*==' /launcher/locks/toolkit.txt | tr -d = | xargs python3 -m pip uninstall --yes
    fi
    exit
fi

release="$(python3 -c 'import torch; print(torch.version.cuda)')"

own=/usr/local/cuda
if [ -x "$own/bin/nvcc" ] && "$own/bin/nvcc" --version | grep -q "release $release,"; then
    echo "toolkit: the base has CUDA $release"
    ln -s "$own" /opt/venv/cuda
    exit
fi

python3 -m pip install --no-deps --require-hashes --requirement /launcher/locks/toolkit.txt
home="$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu${release%%.*}"
ln -s "$home" /opt/venv/cuda
# Linkers look for lib64 and for names without a version.
ln -s lib "$home/lib64"
echo "$home/lib64" >/launcher/links.txt
for library in "$home"/lib/lib*.so.*; do
    plain="${library%%.so.*}.so"
    if [ ! -e "$plain" ]; then
        ln -s "${library##*/}" "$plain"
        echo "$plain" >>/launcher/links.txt
    fi
done
# The driver lies on the node, never in an image: -lcuda must be found, and --as-needed then drops it.
if [ ! -e "$home/lib/libcuda.so" ]; then
    gcc -shared -Wl,-soname,libcuda.so.1 -o "$home/lib/libcuda.so" -x c /dev/null
    echo "$home/lib/libcuda.so" >>/launcher/links.txt
fi
