#!/usr/bin/env bash
# gpu.sh OUT [OSPREY [STEP...]]: everything worth knowing of a machine with a GPU in one go, most important first, for when such a machine
# is there for half an hour. Steps are doctor (doctor.txt and doctor.json in OUT), fresh (the kernels compiled there, where nvcc is, and
# examined again: fresh.txt, fresh.json), memcheck and racecheck (the checks under compute-sanitizer, where that is); without any, all are
# taken. OSPREY is a program built with the feature cuda (default: target/release/osprey).
#
# Such a program needs cuBLAS, cuRAND and NVRTC when it starts. Where the loader does not find them, those of CUDA_HOME, /usr/local/cuda or
# a Python with PyTorch are taken.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: $0 OUT [OSPREY [STEP...]]" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
osprey=${2:-$here/../target/release/osprey}
steps=" ${*:3} "
[ "$steps" != "  " ] || steps=" doctor fresh memcheck racecheck "
wanted() { [[ $steps == *" $1 "* ]]; }
[ -x "$osprey" ] || { echo "$0: $osprey is no program: build it with cargo build --release --features cuda" >&2; exit 2; }

folders=
for folder in "${CUDA_HOME:+$CUDA_HOME/lib64}" /usr/local/cuda/lib64 /usr/local/nvidia/lib64 \
    $(python3 -c 'import glob, sysconfig; print(*glob.glob(sysconfig.get_paths()["purelib"] + "/nvidia/*/lib"))' 2>/dev/null); do
    [ -n "$folder" ] && [ -d "$folder" ] && folders=$folders:$folder
done
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}$folders
missing=$(ldd "$osprey" | grep 'not found')
[ -z "$missing" ] || { echo "$0: libraries that $osprey needs are not here:"; echo "$missing"; exit 1; } >&2

status=0
section() { printf '\n===== %s (%s s) =====\n' "$1" "$SECONDS"; }
# Runs a command for at most so many seconds, into OUT/NAME.txt and on the terminal.
keep() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2
    shift 2
    section "$name"
    timeout "$seconds" "$@" 2>&1 | tee "$out/$name.txt"
    local code=${PIPESTATUS[0]}
    [ "$code" = 0 ] || { echo "$name ended with $code"; status=1; }
}

keep gpu 30 nvidia-smi
! wanted doctor || keep doctor 480 "$osprey" doctor --json "$out/doctor.json"

if ! wanted fresh; then
    :
elif nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null); then
    section 'kernels compiled here'
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
    export PATH=$(dirname "$nvcc"):$PATH
    if printf '%s\n' "$here"/*.cu | xargs -P "$(nproc)" -n 1 "$here/build.sh" "$out/kernels" "$capability" >"$out/build.txt" 2>&1; then
        OSPREY_KERNELS=$out/kernels keep fresh 300 "$osprey" doctor --json "$out/fresh.json"
    else
        cat "$out/build.txt"
        status=1
    fi
    rm -rf "$out/kernels"
else
    echo 'SKIPPED: no nvcc, only the embedded kernels were examined'
fi

if ! wanted memcheck && ! wanted racecheck; then
    :
elif sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
    for tool in memcheck racecheck; do
        ! wanted "$tool" || keep "$tool" 300 "$sanitizer" --tool "$tool" --error-exitcode 9 "$osprey" doctor --checks-only
    done
else
    echo 'SKIPPED: no compute-sanitizer'
fi
exit "$status"
