#!/usr/bin/env bash
# The way of tune_synthesizer_7b.sh at the size of SmolLM2-135M, on two CPU cores, from data to a table: build question-answer data out of
# Debian packages, tune for a quarter of an epoch, let the model write for contexts that it never saw before and after, and compare.
#
#   PACKAGES=debs OUT=runs/synthesizer-135m examples/tune_synthesizer_cpu.sh
#
# PACKAGES is a folder of .deb files: cd debs && apt-get download perl-doc debian-faq r-doc-html ffmpeg-doc dict-foldoc python3.11-doc
# (examples/synthesizer_data/sources.yaml pins their content). Run again, it does what is missing. About an hour.
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-runs/synthesizer-135m} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$PYTHON" examples/synthesizer_data/build.py --packages "${PACKAGES:-debs}" --output-dir "$OUT/data"
"$PYTHON" examples/quickstart/smollm2.py "$OUT/base"
MODEL=$OUT/base DATA=$OUT/data/train RECIPE=examples/tune_synthesizer_cpu.yaml EPOCHS=1 EXAMPLES=150 \
    LAUNCH="--standalone --nproc-per-node 2" examples/tune_synthesizer_7b.sh --train-iters 12 "$@"

runs=()
for shots in 0 2; do
    "$PYTHON" tools/make_synthesizer_questions.py --input "$OUT/data/evaluation" --output-dir "$OUT/questions-$shots" --shots "$shots" \
        --contexts 24 --questions 1 --held-out python-faq jargon
    for name in untuned tuned; do
        if [ $name = tuned ]; then model=$OUT/synthesizer; else model=$OUT/base; fi
        "$PYTHON" tools/synthesize.py --input "$OUT/questions-$shots/texts.jsonl" --output-dir "$OUT/written/$name-$shots" --model "$model" \
            --rounds $((shots + 1)) --question-key question --pairs-key pairs --filters grounding --max-new-tokens 100 --max-model-len 2048
        runs+=("$name, $shots shots" "$OUT/written/$name-$shots")
    done
done
"$PYTHON" tools/evaluate_synthesizer.py --runs "${runs[@]}" --output-dir "$OUT/evaluation"
