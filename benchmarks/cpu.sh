#!/usr/bin/env bash
# Figures of the demo pair on this machine, and the pictures of them:
#     benchmarks/cpu.sh [methods | padded]
# methods: costs of rounds, and every method, where the target lies in the processor's cache.
# padded: speedups by batch size of the same target where every step reads 600 MB of weights from
# memory, see benchmarks/padded.py, with its own drafter, the best of the others and none. Without a
# word both.
# Options go to infer.benchmark: a run that was cut goes on with --resume.
# README shows what the programs print; tests compare the two.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
parts="methods padded"
case ${1:-} in methods | padded) parts=$1 && shift ;; esac

if [[ $parts == *methods* ]]; then
    [[ " $* " == *" --resume "* ]] || "$python" -m infer.profile --bookkeeping \
        --json benchmarks/round_cost.json --plot benchmarks/round_cost.png
    "$python" -m infer.benchmark --methods all --temperature 0 1 --limit 8 --max-new-tokens 96 \
        --tree-nodes 16 --repeats 2 --json benchmarks/methods.json "$@"
    "$python" -m infer.report benchmarks/methods.json --plot benchmarks/methods.png
fi
if [[ $parts == *padded* ]]; then
    rm -rf runs/padded
    "$python" benchmarks/padded.py runs/padded
    "$python" -m infer.benchmark --target runs/padded \
        --drafters ctc_spec_jax/demo/drafter ctc_spec_jax/demo/drafters/eagle \
        --methods ctc,eagle,prompt_lookup --temperature 0 --batch 1 2 4 16 --tree-nodes 4 \
        --limit 16 --max-new-tokens 48 --repeats 2 --no-split --json benchmarks/batch.json "$@"
    "$python" -m infer.report benchmarks/batch.json --plot benchmarks/batch.png
fi
