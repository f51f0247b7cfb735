#!/bin/sh
# Builds DeepSpeed from source with every op of ops.txt compiled, for nodes that have no compiler.
set -eu
export DS_ACCELERATOR="$FLAVOUR" DS_ENABLE_NINJA=1
export CPU_ARCH TORCH_CUDA_ARCH_LIST="$CUDA_ARCHITECTURES"

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

if [ "$FLAVOUR" = cuda ]; then
    # The toolkit comes from PyPI into the folder where torch already keeps the CUDA libraries; what it adds
    # is taken away again, since only the compiler needs it.
    names() { python3 -m pip freeze --all | sed -E 's/[ =@].*//' | tr 'A-Z_.' 'a-z--' | sort; }
    names >/launcher/before.txt
    python3 -m pip install \
        "cuda-toolkit[nvcc,cccl,cudart,curand,cublas,cusparse,cusolver,nvrtc,nvtx]==$(python3 -c \
            'import torch; print(torch.version.cuda)').*"
    CUDA_HOME="$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13"
    export CUDA_HOME
    links="$CUDA_HOME/lib64"
    ln -sfn lib "$links"
    for library in "$CUDA_HOME"/lib/lib*.so.*; do
        plain="${library%%.so.*}.so"
        if [ ! -e "$plain" ]; then
            ln -s "${library##*/}" "$plain"
            links="$links $plain"
        fi
    done
    if [ ! -e "$CUDA_HOME/lib/libcuda.so" ]; then # -lcuda must be found; --as-needed then drops it
        gcc -shared -Wl,-soname,libcuda.so.1 -o "$CUDA_HOME/lib/libcuda.so" -x c /dev/null
        links="$links $CUDA_HOME/lib/libcuda.so"
    fi
fi

python3 -m pip install --no-build-isolation --no-binary deepspeed \
    --constraint /launcher/requirements.txt "$(grep '^deepspeed==' /launcher/requirements.txt)"

if [ "$FLAVOUR" = cuda ]; then
    # shellcheck disable=SC2086  # a list of paths without spaces
    rm -f $links
    names | comm -13 /launcher/before.txt - | grep -E '^(cuda|nvidia)-' | grep -v -x nvidia-ml-py |
        xargs -r python3 -m pip uninstall --yes
fi

# The builders always say -g: nine tenths of each op are names for a debugger that the image does not have.
find /opt/venv -path '*/deepspeed/ops/*' -name '*.so' -exec strip --strip-debug {} +
