#!/usr/bin/env bash
# Pre-train by a recipe of this folder on the GPUs of this machine:
#
#   examples/pretrain/run.sh 500M-scratch instruct [more flags of tools/pretrain.py]
#   examples/pretrain/run.sh 70B-scratch vanilla --dry-run      # what it would be; needs neither GPUs nor data
#
# Both arms share the recipe and differ in what they read, below DATA (default data):
#   vanilla   raw_text_document
#   instruct  augmented_text_document with the texts left raw (from scratch) or general instructions (continual), by WEIGHTS
# On several machines: examples/slurm/pretrain.sbatch.
set -euo pipefail
cd "$(dirname "$0")/../.."

recipe=${1:?name a recipe: $(cd examples/pretrain && ls -- *.yaml | sed 's/.yaml$//' | paste -sd' ')}
arm=${2:?name an arm: vanilla or instruct}
shift 2
config=examples/pretrain/$recipe.yaml
[ -f "$config" ] || { echo "run.sh: error: no recipe $recipe; there are $(cd examples/pretrain && ls -- *.yaml | sed 's/.yaml$//' | paste -sd' ')" >&2; exit 2; }
data=${DATA:-data}
case $recipe in *-continual) other=general ;; *) other=raw ;; esac
case $arm in
    vanilla) blend=("$data/raw_text_document") ;;
    # shellcheck disable=SC2206  # two words
    instruct) weights=(${WEIGHTS:-0.5 0.5}); blend=("${weights[0]}" "$data/augmented_text_document" "${weights[1]}" "$data/${other}_text_document") ;;
    *) echo "run.sh: error: arm '$arm' is unknown; use vanilla or instruct." >&2; exit 2 ;;
esac
python=${PYTHON:-.venv/bin/python}
flags=(--config "$config" --train-data-path "${blend[@]}" --valid-data-path "$data/heldout_text_document"
    --tokenizer-model "${TOKENIZER:-tokenizer}" --save "checkpoints/$recipe-$arm" "$@")
for flag in "$@"; do
    if [ "$flag" = --dry-run ]; then exec "$python" tools/pretrain.py "${flags[@]}"; fi
done
# a launcher, such as examples/slurm/pretrain.sbatch, names the machines in LAUNCH
exec "$python" tools/launch.py ${LAUNCH:---standalone --nproc-per-node gpu} tools/pretrain.py "${flags[@]}"
