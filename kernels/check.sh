#!/usr/bin/env bash
# check.sh [DIR]: compiles every kernel with nvcc for each architecture into DIR (kept when named), and fails when one spills registers or
# keeps arrays in local memory, or when the machine code of decode attention lacks tensor-core instructions or 16-byte loads. Uses
# CUDA_HOME's tools or those in PATH; says SKIPPED where there is no nvcc.
set -euo pipefail
cd "$(dirname "$0")"
PATH=${CUDA_HOME:+$CUDA_HOME/bin:}$PATH
architectures=(80 90 100)

if ! command -v nvcc >/dev/null; then
    echo 'SKIPPED: no nvcc, kernels are not compiled for GPUs'
    exit 0
fi
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    dir=$(cd "$1" && pwd)
else
    dir=$(mktemp -d)
    trap 'rm -rf "$dir"' EXIT
fi

compile() { # SOURCE ARCH: leaves DIR/SOURCE-ARCH.cubin and .log
    local out
    out=$dir/$(basename "$1" .cu)-$2
    nvcc -std=c++17 -O3 -fmad=false -arch="sm_$2" -cubin -Xptxas -v -Werror all-warnings -o "$out.cubin" "$1" >"$out.log" 2>&1 || { cat "$out.log"; return 1; }
}
export -f compile
export dir
for source in *.cu testing/*.cu; do
    for architecture in "${architectures[@]}"; do
        echo "$source $architecture"
    done
done | xargs -P "$(nproc)" -L 1 bash -c 'compile "$@"' compile

# One line per kernel: registers, static shared memory, stack and spills.
summarize() {
    awk '/Compiling entry function/ { split($0, part, "\047"); name = part[2] }
         /stack frame/ { for (i = 2; i < NF; i++) { if ($i == "bytes" && $(i + 1) == "stack") stack = $(i - 1)
                                                    if ($i == "bytes" && $(i + 1) == "spill") spill += $(i - 1) } }
         /Used [0-9]+ registers/ { for (i = 1; i < NF; i++) { if ($i == "Used") registers = $(i + 1); if ($(i + 1) == "bytes" && $(i + 2) ~ /^smem/) shared = $i }
                                   print name, registers, shared + 0, stack + 0, spill + 0; shared = stack = spill = 0 }' "$@"
}

failed=0
for architecture in "${architectures[@]}"; do
    for log in "$dir"/*-"$architecture".log; do
        while read -r name registers shared stack spill; do
            [ -n "${VERBOSE:-}" ] && echo "sm_$architecture $name: $registers registers, $shared bytes shared"
            if [ "$stack" != 0 ] || [ "$spill" != 0 ]; then
                echo "sm_$architecture: $name has a stack of $stack bytes and spills $spill bytes" >&2
                failed=1
            fi
        done < <(summarize "$log")
    done
done

# Functions `decode_attention_*` in machine code (or PTX) on stdin that lack either pattern.
lacking() { # HEADER PRODUCT LOAD
    awk -v header="$1" -v product="$2" -v load="$3" '
        function tell() { if (name ~ /^decode_attention_/ && !(products && loads)) print name ": " products + 0 " tensor-core instructions, " loads + 0 " 16-byte loads" }
        $0 ~ header { tell(); name = $0; sub(header, "", name); sub(/[^A-Za-z0-9_].*/, "", name); products = loads = 0 }
        $0 ~ product { products++ }
        $0 ~ load { loads++ }
        END { tell() }'
}

decode=(attention_decode*.cu)
if [ -e "${decode[0]}" ]; then
    for source in "${decode[@]}"; do
        for architecture in "${architectures[@]}"; do
            cubin=$dir/${source%.cu}-$architecture.cubin
            if command -v cuobjdump >/dev/null && command -v nvdisasm >/dev/null; then
                missing=$(cuobjdump -sass "$cubin" | lacking '^.*Function : ' '[ \t]HMMA' 'LDG\.E[A-Z0-9.]*\.128|LDGSTS\.E[A-Z0-9.]*\.128')
            else
                missing=$(nvcc -std=c++17 -O3 -fmad=false -arch="compute_$architecture" -ptx -o - "$source" |
                    lacking '^.*[.]entry ' 'mma[.]sync' 'ld[.]global[a-zA-Z0-9_:.]*[.]v4|cp[.]async[.]cg')
            fi
            [ -z "$missing" ] || { echo "sm_$architecture: $missing" >&2; failed=1; }
        done
    done
fi
[ "$failed" = 0 ] || exit 1
echo "$(find "$dir" -name '*.cubin' | wc -l) files for ${architectures[*]/#/sm_} compile without spills"
