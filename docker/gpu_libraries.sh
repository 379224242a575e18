#!/usr/bin/env bash
# Builds what the base lacks of the libraries that are compiled against its torch and CUDA.
#
#   bash docker/gpu_libraries.sh APEX_COMMIT DEEPEP_COMMIT     an empty commit leaves the library out
set -euo pipefail

apex=$1 deepep=$2
transformer_engine=2.20.2

has() {
    python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}
build() {
    python3 -m pip install --no-deps --no-build-isolation "$@"
}

if ! command -v nvcc >/dev/null; then
    echo "no CUDA compiler in the base: no Transformer Engine, apex or DeepEP; the image trains on CPUs"
    exit 0
fi
if has transformer_engine; then
    echo "Transformer Engine: the base's"
else
    python3 -m pip install --no-deps \
        "transformer-engine==$transformer_engine" "transformer-engine-cu13==$transformer_engine"
    build "transformer-engine-torch==$transformer_engine"
fi
# Megatron-Core takes Transformer Engine's optimizer and kernels where apex is absent.
if has apex; then
    echo "apex: the base's"
elif [[ -n $apex ]]; then
    # Older commits read the one, newer ones the other.
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 build --config-settings "--build-option=--cpp_ext --cuda_ext" \
        "git+https://github.com/NVIDIA/apex.git@$apex"
else
    echo "apex: left out"
fi
if [[ -n $deepep ]]; then
    build "git+https://github.com/deepseek-ai/DeepEP.git@$deepep"
else
    echo "DeepEP: left out (--build-arg DEEPEP_COMMIT builds it; experts use NCCL without it)"
fi
