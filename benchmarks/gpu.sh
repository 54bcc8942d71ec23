#!/usr/bin/env bash
# Figures of one GPU: steps beside the limit, growth, and a pair trained on chats.
#
#   OUT=runs/gpu PARTS="steps growth train" benchmarks/gpu.sh [CHATS.jsonl]
#
# Every command ends after LIMIT seconds at the latest; what it had measured is in its JSON by then.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu} PARTS=${PARTS:-steps growth train} CHATS=${1:-} PYTHON=${PYTHON:-python}
LIMIT=${LIMIT:-530} STEPS=${STEPS:-4000} ANSWERS=${ANSWERS:-8192} VOCAB=${VOCAB:-8192}
DTYPE=${DTYPE:-bfloat16}
MODEL=${MODEL:-model.width=512 model.layers=6 model.heads=8 model.kv_heads=8 model.mlp_width=1408}
mkdir -p "$OUT"
run() { # name, command: results in a .txt, progress in a .log, one line on the screen
  local name=$1 began=$SECONDS; shift
  timeout "$LIMIT" "$@" >"$OUT/$name.txt" 2>"$OUT/$name.log"
  echo "$name: status $?, $((SECONDS - began)) s"
}
py() { run "$1" "$PYTHON" -m "${@:2}"; }
steps() { # name, model, more
  "$PYTHON" -c "import matplotlib" 2>/dev/null && local plot=(--plot "$OUT/$1.png")
  py "$1" infer.steps --model "configs/models/$2.json" --dtype bfloat16 --json "$OUT/$1.json" \
    ${plot[@]+"${plot[@]}"} "${@:3}"
}
if [[ $PARTS == *steps* ]]; then
  for model in llama2_7b qwen3_8b; do # torch needs room of its own beside jax
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.6 steps "$model" $model --base 512 64 1 --peers
  done
  CTC_SPEC_XLA=graphs steps llama2_7b_graphs llama2_7b --base 512 64 1
  steps llama2_7b_int8 llama2_7b --base 512 64 1 --int8
fi
if [[ $PARTS == *growth* ]]; then
  steps nodes llama2_7b --repeats 3 --tree-nodes 1 4 16 64 256
  steps batch llama2_7b --repeats 3 --base 512 16 1 --batch 8 64
  steps context llama2_7b --repeats 3 --context 128 2048 8192 32768
fi
if [[ $PARTS == *train* && ! -r $CHATS ]]; then
  echo "train: left out, no file of chats was named"
elif [[ $PARTS == *train* ]]; then
  export ANSWERS PYTHONPATH="$OUT:$PWD"
  run chats "$PYTHON" benchmarks/chats.py "$CHATS" "$OUT"
  once=run.eval_every=100000 # at the end
  py target train.train --config configs/small_target.yaml run.folder="$OUT/target" \
    run.steps="$STEPS" $once dtype="$DTYPE" 'data.sources=[chat_texts]' data.max_bytes=0 \
    data.vocab_size="$VOCAB" batch.rows=64 batch.microbatch=32 batch.length=512 optim.rate=1.0e-3 $MODEL
  py answers train.regenerate --target "$OUT/target/export" --prompts "$OUT/prompts.jsonl" \
    --template "$OUT/chat.jinja" --out "$OUT/answers.jsonl" --rows 256 --max-new-tokens 128 \
    --dtype "$DTYPE" --temperature 0.8
  for pair in ctc:small_drafter medusa:demo_medusa eagle:demo_eagle; do
    py "${pair%:*}" train.train --config "configs/${pair#*:}.yaml" run.folder="$OUT/${pair%:*}" \
      target="$OUT/target/export" run.steps="$STEPS" $once dtype="$DTYPE" \
      "data.files=[$OUT/answers.jsonl]" data.max_loop=1.0 'drafter.taps=[]' batch.rows=32 \
      batch.microbatch=32 ${DRAFTER:-}
  done
  py benchmark infer.benchmark --target "$OUT/target/export" --template "$OUT/chat.jinja" \
    --drafters "$OUT"/{ctc,medusa,eagle}/export --prompts "$OUT/questions.jsonl" --limit "${QUESTIONS:-16}" \
    --methods ctc,medusa,eagle,prompt_lookup --tree-nodes 16 --batch 1 8 --max-new-tokens 128 \
    --dtype "$DTYPE" --no-split --json "$OUT/benchmark.json" --report "$OUT/benchmark.html"
fi
for table in "$OUT"/*.txt; do printf '\n== %s\n' "$table"; tail -n 14 "$table"; done
