#!/usr/bin/env bash
# Tune an instruction synthesizer: task data -> sequences of several examples of one data set -> training on the pairs -> a Hugging Face folder.
#
#   MODEL=Mistral-7B-v0.1 DATA=ft-instruction-synthesizer-collection OUT=runs/synthesizer examples/tune_synthesizer_7b.sh [flags of tools/pretrain.py]
#   examples/tune_synthesizer_7b.sh --dry-run     # every command, and what the run would be; needs neither GPUs, model nor data
#
# MODEL  the model to tune, in Hugging Face form        DATA      files, folders or patterns of rows: context, QA_list, rc_name
# OUT    where everything goes                          RECIPE    settings of tools/pretrain.py (examples/tune_synthesizer_7b.yaml)
# EPOCHS passes over the data (5)                       EXAMPLES  examples of one data set, at most (10000)
# LAUNCH how torchrun finds its processes (--standalone --nproc-per-node gpu)
# Run again, it does what is missing. The result is OUT/synthesizer, for tools/synthesize.py --prompt-format instruction-synthesizer.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
model=${MODEL:-models/Mistral-7B-v0.1} out=${OUT:-runs/synthesizer} recipe=${RECIPE:-examples/tune_synthesizer_7b.yaml}
# shellcheck disable=SC2206  # words
data=(${DATA:-data/ft-instruction-synthesizer-collection}) launch=(${LAUNCH:---standalone --nproc-per-node gpu})
setting() { sed -n "s/^$1: *//p" "$recipe"; }
length=$(setting seq_length) batch=$(setting global_batch_size)

dry=
for word in "$@"; do if [ "$word" = --dry-run ]; then dry=yes; fi; done
step() {
    printf '$ %s\n' "$*"
    if [ -z "$dry" ]; then "$@"; fi
}

step "$python" tools/prepare_synthesizer_data.py --input "${data[@]}" --output-dir "$out/rows" --tokenizer-model "$model" \
    --seq-length "$length" --max-examples "${EXAMPLES:-10000}"
# one data set at a time, so that a sequence holds examples of one data set
names=(DATA_SET)
if [ -z "$dry" ]; then names=(); for file in "$out"/rows/documents/*.jsonl; do names+=("$(basename "$file" .jsonl)"); done; fi
for name in "${names[@]}"; do
    step "$python" tools/preprocess_data.py --input "$out/rows/documents/$name.jsonl" --output-prefix "$out/sets/$name" \
        --tokenizer-model "$model" --prepend-bos --append-eod --pack-sequence-length "$length"
done
step "$python" tools/merge_datasets.py --input "$out/sets" --output-prefix "$out/sequences"
step "$python" tools/convert_checkpoint.py --load "$model" --save "$out/imported"

train=("$python" tools/pretrain.py --config "$recipe" --train-data-path "$out/sequences")
# the model itself says what it is; without it, Mistral-7B on four GPUs
if [ -n "$dry" ]; then exec "${train[@]}" --preset 7B --vocab-size 32000 --world-size 4 --save "$out/trained" "$@"; fi
count='import json, sys; print(max(int(sys.argv[2]) * json.load(open(sys.argv[1]))["counts"]["documents"] // int(sys.argv[3]), 1))'
iterations=$("$python" -c "$count" "$out/sequences.manifest.json" "${EPOCHS:-5}" "$batch")
step "${train[0]}" -m torch.distributed.run "${launch[@]}" "${train[@]:1}" --load "$out/imported" --save "$out/trained" \
    --train-iters "$iterations" "$@"
step "$python" tools/convert_checkpoint.py --load "$out/trained" --save "$out/synthesizer"
