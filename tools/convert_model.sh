#!/usr/bin/env bash
# A Hugging Face model becomes a folder of Core ML packages: ANEMLL's flags and steps over anequant.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: convert_model.sh --model MODEL --output DIR [options] [-- QUANTIZE OPTIONS]

  --model MODEL      folder or hub id of a float model
  --output DIR       folder for packages, meta.yaml and tokenizer; the quantized checkpoint goes to
                     DIR-checkpoint beside it
  --context N        most tokens the packages hold (default: 512)
  --batch N          positions that prefill takes at once (default: 64)
  --lut1 BITS|none   embedding (default: none, float16)
  --lut2 BITS        projections (default: 4)
  --lut3 BITS|none   head (default: 6)
  --chunk N|auto     decoder packages (default: 2)
  --prefix NAME      beginning of the file names (default: the architecture's, as in ANEMLL)
  --restart STEP     run from this step on, over what earlier steps left
  --only STEP        run this step alone, over what earlier steps left
  --skip-check       do not look for the tools first
  -- OPTIONS         go to `anequant quantize`, for example --recipe w4-nearest --calib text.txt

Steps, with ANEMLL's numbers:
  1-3  quantize embedding, head and projections (one pass), then 4-5
  4-5  write and verify the packages: prefill and infer are functions of one package from the start
  6    compile for the Mac (xcrun coremlcompiler)
  7    check meta.yaml and the tokenizer, which 4-5 write
  8    generate a little text: Core ML on a Mac, else the interpreter
A checkpoint that is quantized already needs `anequant lower` only.
TEXT
}

fail() {
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

model='' output='' context=512 batch=64 lut1=none lut2=4 lut3=6 chunk=2 prefix='' first=1 last=8 check=1
while (($#)); do
    case $1 in
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    --skip-check) check=0; shift ;;
    --model | --output | --context | --batch | --lut1 | --lut2 | --lut3 | --chunk | --prefix | --restart | --only)
        (($# > 1)) || fail 2 "$1 needs a value"
        case $1 in
        --restart | --only)
            [[ $2 =~ ^[1-8]$ ]] || fail 2 "$1 is '$2', it must be a step from 1 to 8"
            first=$2
            [[ $1 == --restart ]] || last=$2
            force=(--force)
            ;;
        *) printf -v "${1#--}" %s "$2" ;;
        esac
        shift 2
        ;;
    *) fail 2 "unknown option '$1'; see --help" ;;
    esac
done
[[ -n $model && -n $output ]] || fail 2 "--model and --output are needed; see --help"
[[ $lut2 != none && $lut2 != 16 ]] || fail 2 "--lut2 is '$lut2', the packages' projections are palettized"
output=${output%/}
checkpoint=$output-checkpoint

anequant=$(command -v anequant || true)
[[ -n $anequant ]] || anequant=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/anequant
mac=0
[[ $(uname -s) != Darwin ]] || mac=1
if ((check)); then
    [[ -x $anequant ]] || fail 2 "anequant is not installed: run make demo, or put it on the PATH"
    ((!mac)) || xcrun --find coremlcompiler >/dev/null || fail 5 "coremlcompiler is missing: install Xcode"
fi

# includes FROM TO : whether one of these steps is to run.
includes() {
    ((first <= $2 && last >= $1))
}

if includes 1 3; then
    printf 'steps 1-3: quantize\n'
    "$anequant" quantize "$model" --output "$checkpoint" --lut-embeddings "$lut1" \
        --lut-ffn "$lut2" --lut-head "$lut3" ${force[@]+"${force[@]}"} "$@"
fi
if includes 1 5; then
    printf 'steps 4-5: lower and verify\n'
    "$anequant" lower "$checkpoint" --output "$output" --context "$context" --batch "$batch" \
        --chunks "$chunk" ${prefix:+--prefix "$prefix"} ${force[@]+"${force[@]}"}
    "$anequant" verify "$output" --checkpoint "$checkpoint"
fi
[[ -f $output/meta.yaml ]] || fail 3 "'$output' holds no packages: run it from step 1 or 5"
if includes 6 6 && ((mac)); then
    printf 'step 6: compile\n'
    for package in "$output"/*.mlpackage; do
        xcrun coremlcompiler compile "$package" "$output"
    done
fi
if includes 7 7; then
    for name in tokenizer.json tokenizer_config.json config.json; do
        [[ -f $output/$name ]] || fail 3 "'$output/$name' is missing: ANEMLL's runtimes need it"
    done
    printf 'step 7: meta.yaml and tokenizer are there\n'
fi
if includes 8 8; then
    printf 'step 8: generate\n'
    backend=interpreter
    ((!mac)) || backend=coreml
    "$anequant" generate "$output" --prompt "Who are you?" --max-tokens 16 --backend "$backend"
fi
if includes 6 6 && ((!mac)); then
    printf 'left for the Mac: xcrun coremlcompiler compile on every package (tools/convert_model.sh --only 6)\n'
fi
printf 'done: %s\n' "$output"
