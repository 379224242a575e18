#!/usr/bin/env bash
# Fine-tunes a small DeepSeek-V3 on two CPU processes and gives a Hugging Face directory back.
#
#   bash examples/quickstart.sh [section.key=value ...]     (or: make quickstart)
#
# Needs the packages of `pip install -e .[dev]` and nothing from a network. Overrides go to the job.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=build/quickstart
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONWARNINGS=ignore
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg TOKENIZERS_PARALLELISM=false
# Keeps freed memory for the next step: logits of a 129k vocabulary cost 50,000 page faults else.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
# Compiling costs more than the tiny model that it would speed up.
export TORCHDYNAMO_DISABLE=1

rm -rf "$out"
python examples/quickstart/prepare.py "$out"
python -m megatron_dsv3.cli prepare "$out/champ.jsonl" --model "$out/model" --out "$out/tokens" \
    --template deepseek_r1 --seq-length 384 --workers 1
torchrun --standalone --nproc-per-node 2 examples/quickstart/train.py \
    "$out/probe.pt" examples/quickstart/job.yaml "$@"
python examples/quickstart/check.py "$out"
