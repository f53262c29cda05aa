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
step ended, also when one failed; the exit code is that of the first step that did.
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

chip=$(sysctl -n machdep.cpu.brand_string | tr -cd 'A-Za-z0-9 ()@.')
printf '{"macos": "%s", "chip": "%s", "memory_bytes": %s, "exit_code": %d, "steps": [%s]}\n' \
    "$(sw_vers -productVersion)" "$chip" "$(sysctl -n hw.memsize)" "$first_failure" "$steps" >"$report"
printf 'report: %s\n' "$report"
exit "$first_failure"
