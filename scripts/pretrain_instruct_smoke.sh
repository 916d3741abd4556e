#!/usr/bin/env bash
# A short training run that shows the whole path works: scripts/pretrain_instruct_smoke.sh [key=value ...]
# SMOKE_SUBSET_SIZE SMOKE_SEQ_LEN SMOKE_TEST_RATIO SMOKE_GLOBAL_BATCH SMOKE_EPOCHS SMOKE_DATA_DIR change its settings; arguments are Hydra
# overrides and win. Without SlimOrca on disk or a network it uses the bundled data; without a GPU, a small preset.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment requirements.txt

python scripts/fetch_tokenizer.py
data_dir="${SMOKE_DATA_DIR:-data/slimorca}"
settings=(
    "dataset.subset_size=${SMOKE_SUBSET_SIZE:-64}"
    "dataset.seq_len=${SMOKE_SEQ_LEN:-512}"
    "dataset.test_ratio=${SMOKE_TEST_RATIO:-0.05}"
    "global_batch_size=${SMOKE_GLOBAL_BATCH:-8}"
    "epochs=${SMOKE_EPOCHS:-1}"
)
if python -m dataset.slimorca --data-dir "$data_dir"; then
    settings=("dataset=slimorca" "dataset.data_dir=$data_dir" "${settings[@]}")
else
    echo "smoke: no SlimOrca in $data_dir and none to be had: using the bundled data instead"
    python -m dataset.build_sample_dataset --output-dir data/smoke --train-size 2000
    settings=("dataset=sample" "dataset.data_dir=data/smoke" "project_name=Sample-ACT" "${settings[@]}")
fi
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "smoke: no GPU, using the small preset experiment=cpu_small"
    settings=("experiment=cpu_small" "${settings[@]}")
fi
python pretrain_instruct.py "${settings[@]}" "$@"
