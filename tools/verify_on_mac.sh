#!/usr/bin/env bash
# Convert a model on a Mac, compile and run its packages there, and write one JSON file with what happened.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: verify_on_mac.sh [--model MODEL] [--work DIR] [--report FILE.json] [--tokens N] [-- CONVERT OPTIONS]

  --model     folder or hub id (default: the bundled model)
  --work      new folder for the packages (default: anequant-on-mac)
  --report    JSON file to write (default: anequant-on-mac.json)
  --tokens    tokens to decode (default: 64)

Steps: anequant convert; xcrun coremlcompiler for every package; anequant profile, which predicts with
Core ML and the interpreter, compares them, and tells where every operation ran. The report says how each
step ended, also when one failed; the exit code is that of the first step that did. On macOS 27 or later,
with anequant[coreai], the checkpoint is also lowered to Core AI, verified there, and compiled by
coreai-build where Xcode has it; elsewhere the report says why not.
TEXT
}

fail() {
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

model='' work=anequant-on-mac report=anequant-on-mac.json tokens=64
while (($#)); do
    case $1 in
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    --model | --work | --report | --tokens)
        (($# > 1)) || fail 2 "$1 needs a value"
        case $1 in
        --model) model=$2 ;;
        --work) work=$2 ;;
        --report) report=$2 ;;
        --tokens) tokens=$2 ;;
        esac
        shift 2
        ;;
    *) fail 2 "unknown option $1; see --help" ;;
    esac
done

[[ $(uname -s) == Darwin ]] || fail 4 "this needs a Mac: Core ML compiles and predicts on macOS only"
anequant=$(command -v anequant || true)
[[ -n $anequant ]] || anequant=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/anequant
[[ -x $anequant ]] || fail 2 "anequant is not installed: run make demo, or put it on the PATH"
xcrun --find coremlcompiler >/dev/null || fail 5 "coremlcompiler is missing: install Xcode"

steps='' first_failure=0

# run_step NAME COMMAND... : its JSON (or null) and exit code become one entry of the report.
run_step() {
    local name=$1 output code=0 begun=$SECONDS
    shift
    ((first_failure == 0)) || return 0
    printf 'step: %s\n' "$name" >&2
    output=$("$@") || code=$?
    ((code == 0)) || first_failure=$code
    steps+=$(printf '%s{"step": "%s", "exit_code": %d, "seconds": %d, "result": %s}' \
        "${steps:+, }" "$name" "$code" "$((SECONDS - begun))" "${output:-null}")
}

# skip_step NAME REASON: an entry of the report for what was not done.
skip_step() {
    printf 'step: %s left out: %s\n' "$1" "$2" >&2
    steps+=$(printf '%s{"step": "%s", "skipped": "%s"}' "${steps:+, }" "$1" "$2")
}

# why_no_core_ai: the reason why Core AI cannot be used, nothing where it can.
why_no_core_ai() {
    local version=$1
    if ((${version%%.*} < 27)); then
        printf 'Core AI comes with macOS 27, this is %s' "$version"
        return
    fi
    "$(dirname "$anequant")/python" -c '
from anequant.targets.coreai.installed import find_problem
problem = find_problem()
print(problem.what if problem else "", end="")'
}

# shellcheck disable=SC2329
compile_asset() {
    local asset
    for asset in "$work"-coreai/*.aimodel; do
        xcrun coreai-build compile "$asset" --preferred-compute neural-engine >&2 || return
    done
}

# shellcheck disable=SC2329
compile() {
    local package
    for package in "$work"/packages/*.mlpackage; do
        xcrun coremlcompiler compile "$package" "$work/packages" >&2 || return
    done
}

run_step convert "$anequant" convert ${model:+"$model"} --output "$work" --json "$@"
run_step compile compile
run_step profile "$anequant" profile "$work" --tokens "$tokens" --json

reason=$(why_no_core_ai "$(sw_vers -productVersion)")
if [[ -n $reason ]]; then
    skip_step coreai "$reason"
else
    run_step coreai-lower "$anequant" lower "$work/checkpoint" --output "$work-coreai" --target coreai --json
    run_step coreai-verify "$anequant" verify "$work-coreai" --checkpoint "$work/checkpoint" --json
    if xcrun --find coreai-build >/dev/null 2>&1; then
        run_step coreai-compile compile_asset
    else
        skip_step coreai-compile 'this Xcode has no coreai-build'
    fi
fi

chip=$(sysctl -n machdep.cpu.brand_string | tr -cd 'A-Za-z0-9 ()@.')
printf '{"macos": "%s", "chip": "%s", "memory_bytes": %s, "exit_code": %d, "steps": [%s]}\n' \
    "$(sw_vers -productVersion)" "$chip" "$(sysctl -n hw.memsize)" "$first_failure" "$steps" >"$report"
printf 'report: %s\n' "$report"
exit "$first_failure"
