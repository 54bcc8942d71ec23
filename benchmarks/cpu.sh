#!/usr/bin/env bash
# Figures of the demo pair on this machine, and the pictures of them:
#     benchmarks/cpu.sh
# Options go to infer.benchmark: a run that was cut goes on with --resume.
# README shows what the programs print; tests compare the two.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[[ " $* " == *" --resume "* ]] || "$python" -m infer.profile --bookkeeping \
    --json benchmarks/round_cost.json --plot benchmarks/round_cost.png
"$python" -m infer.benchmark --methods all --temperature 0 1 --limit 8 --max-new-tokens 96 \
    --tree-nodes 16 --repeats 2 --json benchmarks/methods.json "$@"
"$python" -m infer.report benchmarks/methods.json --plot benchmarks/methods.png
