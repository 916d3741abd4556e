#!/usr/bin/env bash
# From a clean clone to a trained, measured, answering model: scripts/quickstart.sh [key=value ...]
# Further arguments are Hydra overrides of the training run. Run again, it reuses what is there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment requirements.txt

run=checkpoints/Sample-ACT/quickstart
started=$SECONDS

echo; echo "== tokenizer"
python scripts/fetch_tokenizer.py
echo; echo "== data"
python -m dataset.build_sample_dataset --output-dir data/sample
# The data uses some hundreds of the tokenizer's 32,000 pieces. Trimming the others makes the vocabulary head cheaper, and texts
# keep their pieces.
tokenizer=data/sample/tokenizer.model
[ -f "$tokenizer" ] || python scripts/train_tokenizer.py --trim dataset=sample --output "$tokenizer"

echo; echo "== training"
checkpoint="$(ls -d "$run"/step_* 2>/dev/null | sort -V | tail -n 1 || true)"
if [ -n "$checkpoint" ]; then
    echo "reusing $checkpoint${1:+ as it is, without your settings} (delete $run to train again)"
else
    checkpoint="$(python pretrain_instruct.py experiment=quickstart "dataset.tokenizer_path=$tokenizer" "$@" | tee /dev/stderr | sed -n 's/^checkpoint //p' | tail -n 1)"
    run="$(dirname "$checkpoint")"
fi

echo; echo "== inference over the test split"
python inference_instruct.py --checkpoint "$checkpoint" --generate --max-generated 10 > /dev/null
python scripts/show_answers.py "$checkpoint"

echo; echo "== three messages"
for message in "What is 23 + 45?" "Sort these numbers: 7 2 9 4" "Ben is older than Kate. Kate is older than Max. Is Ben older than Max?"; do
    echo "> $message"
    python generate_instruct.py --checkpoint "$checkpoint" --message "$message"
done

report="$(python scripts/report.py "$run")"

cat <<END

== done in $((SECONDS - started)) s after installation
data        data/sample/train.jsonl, data/sample/test.jsonl
checkpoint  $checkpoint
report      $report (curves, depth, answers by family: open it in a browser)
metrics     $checkpoint/metrics.json, $run/metrics.jsonl
ask it      $VENV/bin/python generate_instruct.py --checkpoint $checkpoint --message "What is 12 + 34?"
END
