#!/usr/bin/env bash
# build.sh DIR ARCH [SOURCE...]: compiles the kernels (all, or those named) into DIR/*.cubin for one architecture such as 90. Osprey loads
# them instead of its own when OSPREY_KERNELS=DIR. EXTRA adds flags for nvcc, such as -lineinfo.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 DIR ARCH [SOURCE...]" >&2; exit 2; }
mkdir -p "$1"
dir=$(cd "$1" && pwd)
arch=${2//./}
shift 2
cd "$(dirname "$0")"
nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
[ $# -gt 0 ] || set -- *.cu
for source in "$@"; do
    source=$(basename "$source" .cu)
    # shellcheck disable=SC2086 # EXTRA is a list
    "$nvcc" -std=c++17 -O3 -fmad=false -arch="sm_$arch" -cubin ${EXTRA:-} -o "$dir/$source.cubin" "$source.cu"
    echo "$dir/$source.cubin"
done
