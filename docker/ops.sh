#!/bin/sh
# Builds DeepSpeed from source with every op of ops.txt compiled, for nodes that have no compiler.
set -eu
export DS_ACCELERATOR="$FLAVOUR" DS_ENABLE_NINJA=1
export CPU_ARCH TORCH_CUDA_ARCH_LIST="$CUDA_ARCHITECTURES"
if [ "$FLAVOUR" = cuda ]; then
    export CUDA_HOME=/opt/venv/cuda
fi

mkdir -p /launcher/bin
for compiler in gcc g++; do
    ln -sf ../portable-cc.sh "/launcher/bin/$compiler"
done
chmod +x /launcher/portable-cc.sh
export CC=/launcher/bin/gcc CXX=/launcher/bin/g++

while read -r op variable flavours; do
    case "$op" in "" | "#"*) continue ;; esac
    case " $flavours " in *" $FLAVOUR "*) export "$variable=1" ;; esac
done </launcher/ops.txt

# The CPU builders forget their linker flags, so async_io would miss libaio. --as-needed for the rest keeps
# the CUDA driver, which only a GPU node has, out of ops that never call it.
export LDFLAGS="-Wl,--no-as-needed -laio -Wl,--as-needed"

python3 -m pip install --no-build-isolation --no-binary deepspeed --no-deps --require-hashes \
    --requirement /launcher/locks/deepspeed.txt

# The builders always say -g: nine tenths of each op are names for a debugger that the image does not have.
find /opt/venv -path '*/deepspeed/ops/*' -name '*.so' -exec strip --strip-debug {} +
