#!/usr/bin/env bash
# Builds and runs the C++ tests, every csrc/tests/test_*.cpp, under the sanitizers: AddressSanitizer and
# UndefinedBehaviorSanitizer together, and what is about threads (threaded) under ThreadSanitizer too, with the generic
# variant alone. Fails on the first finding.
#
#   csrc/tests/run.sh          all of them
#   csrc/tests/run.sh pool     only test_pool.cpp
#
# CXX is the compiler (g++), JOBS how many of it run at once (the number of cores).
set -euo pipefail
cd "$(dirname "$0")/../.."

export CXX="${CXX:-g++}"
jobs="${JOBS:-$(getconf _NPROCESSORS_ONLN)}"
build="$(mktemp -d)"
trap 'rm -rf "$build"' EXIT

die() {
    echo "csrc/tests/run.sh: $*" >&2
    exit 1
}

threaded=" test_pool test_learn "

tests=()
for source in csrc/tests/test_*.cpp; do
    name="$(basename "$source" .cpp)"
    [[ $# -eq 0 || " $* " == *" ${name#test_} "* ]] && tests+=("$name")
done
[[ ${#tests[@]} -gt 0 ]] || die "there is no test of that name: $*; leave the names away to run all"

command -v "$CXX" > "$build/log" || die "the compiler $CXX was not found; set CXX to one with the sanitizers"
for sanitizer in address,undefined thread; do
    echo 'int main() {}' | "$CXX" -fsanitize="$sanitizer" -x c++ - -o "$build/probe" 2> "$build/log" ||
        die "$CXX cannot build with -fsanitize=$sanitizer: $(head -n 1 "$build/log"); set CXX to one that can"
done

# An older ThreadSanitizer does not start where addresses are spread widely.
fixed_addresses=()
if setarch "$(uname -m)" -R true 2> "$build/log"; then fixed_addresses=(setarch "$(uname -m)" -R); fi

# The variants of the kernels that this CPU can run; the others cannot be tested here.
cpu_has() {
    local flag
    for flag in "$@"; do grep -qsw "$flag" /proc/cpuinfo || return 1; done
}
avx512="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma"
variants=(generic)
have=""
add_variant() { # name, then the flags that the CPU must report
    local name="$1" can=0
    shift
    if cpu_has "$@"; then
        can=1
        variants+=("$name")
    fi
    have+=" -DDQL_HAVE_${name^^}=$can"
}
add_variant avx2 avx2 fma
add_variant avx512 avx512f avx512bw avx512dq avx512vl avx2 fma
add_variant avx512bf16 avx512_bf16 avx512f avx512bw avx512dq avx512vl avx2 fma

# with setup.py's flags for floating point
common="-std=c++17 -O1 -g -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra"
common+=" -fno-omit-frame-pointer -fno-sanitize-recover=all -pthread -Icsrc"
asan="$common$have -fsanitize=address,undefined"
tsan="$common -fsanitize=thread"
asan_objects=()
tsan_objects=()
: > "$build/commands"
compile() { # source, object, flags
    echo "$CXX $3 -c $1 -o $build/$2.o" >> "$build/commands"
}

needs_kernels=0
threads_need_kernels=0
for name in "${tests[@]}"; do
    compile "csrc/tests/$name.cpp" "$name" "$asan"
    [[ $name == test_pool ]] || needs_kernels=1
    [[ $threaded == *" $name "* ]] || continue
    compile "csrc/tests/$name.cpp" "thread_$name" "$tsan"
    [[ $name == test_pool ]] || threads_need_kernels=1
done
if [[ $needs_kernels -eq 1 && -f csrc/cpu/variant.cpp ]]; then
    # g++ 12 warns of its own intrinsics when it instruments them
    kernels="$asan -fno-exceptions -Wno-uninitialized -Wno-maybe-uninitialized"
    for variant in "${variants[@]}"; do
        case "$variant" in
            avx2) flags="-mavx2 -mfma" ;;
            avx512) flags="$avx512" ;;
            avx512bf16) flags="$avx512 -mavx512bf16" ;;
            *) flags="" ;;
        esac
        compile csrc/cpu/variant.cpp "$variant" "$kernels -DDQL_VARIANT=$variant $flags"
        asan_objects+=("$build/$variant.o")
    done
fi
if [[ $threads_need_kernels -eq 1 ]]; then
    compile csrc/cpu/variant.cpp thread_generic "$tsan -fno-exceptions -DDQL_VARIANT=generic"
    tsan_objects+=("$build/thread_generic.o")
fi
for source in csrc/cpu/*.cpp; do
    name="$(basename "$source" .cpp)"
    [[ $name == variant ]] && continue # it is compiled above
    grep -qE '#include ("binding.h"|<Python.h>)' "$source" && continue # it needs Python
    [[ $name == pool || $needs_kernels -eq 1 ]] || continue
    compile "$source" "$name" "$asan"
    asan_objects+=("$build/$name.o")
    [[ $name == pool || $threads_need_kernels -eq 1 ]] || continue
    compile "$source" "thread_$name" "$tsan"
    [[ $name == pool ]] || tsan_objects+=("$build/thread_$name.o")
done

echo "$("$CXX" --version | head -n 1); variants here: ${variants[*]}"
xargs -P "$jobs" -I '{}' sh -c '{}' < "$build/commands" || die "the compiler failed"

failed=()
check() { # name, sanitizer, command
    local name="$1" sanitizer="$2"
    shift 2
    echo "$name, -fsanitize=$sanitizer"
    "$@" || failed+=("$name (-fsanitize=$sanitizer, exit status $?)")
}
# New memory is full of NaN: what is read before it is written shows in the results.
export ASAN_OPTIONS="max_malloc_fill_size=1073741824:malloc_fill_byte=255:${ASAN_OPTIONS:-}"
export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
for name in "${tests[@]}"; do
    objects=("${asan_objects[@]}")
    options="$ASAN_OPTIONS"
    if [[ $name == test_pool ]]; then
        objects=("$build/pool.o")
        # not for the kernels: before g++ 14 this misaligns 64-byte vectors on the stack
        options="detect_stack_use_after_return=1:$options"
    fi
    "$CXX" -fsanitize=address,undefined -pthread "$build/$name.o" "${objects[@]}" -o "$build/$name"
    check "$name" address,undefined env ASAN_OPTIONS="$options" timeout 300 "$build/$name"
    if [[ $threaded == *" $name "* ]]; then
        objects=("$build/thread_pool.o")
        [[ $name == test_pool ]] || objects+=("${tsan_objects[@]}")
        "$CXX" -fsanitize=thread -pthread "$build/thread_$name.o" "${objects[@]}" -o "$build/thread_$name"
        check "$name" thread timeout 300 "${fixed_addresses[@]}" "$build/thread_$name"
    fi
done

[[ ${#failed[@]} -eq 0 ]] || die "failed: $(printf '%s; ' "${failed[@]}")"
echo "all passed in $SECONDS s"
