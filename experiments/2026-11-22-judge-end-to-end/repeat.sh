#!/usr/bin/env bash
# The judge's protocol against `transformers serve`, from the repository's root: bash .../repeat.sh FOLDER
# FOLDER must be empty; it gets store, runs and logs. Needs `make setup-smollm2` and fastapi (see README.md here).
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
root=$PWD
work=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-$root/.venv/bin/python}
port=${PORT:-8123}
export GRADSIFT_ARTIFACTS=$work/store HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 NO_PROXY=127.0.0.1

# 24 examples of our own words, half of them drawn at random; 20 questions; SmolLM2 as target and as judge.
run() {
    echo "--- run.py $*"
    (cd "$work" && echo "$BASHPID" >pid && exec "$python" "$root/run.py" data=json data.path="$root/$here/examples.jsonl" scorer=random alpha=0.5 \
        target=smollm2 target.epochs=1 target.batch_size=4 compute.threads=1 tracker=none \
        benchmark=vicuna "+benchmark.catalog.everyday={path: $root/$here/questions.jsonl, id: id, input: input}" \
        'benchmark.sets=[everyday]' benchmark.max_new_tokens=48 \
        judge=openai judge.base_url=http://127.0.0.1:"$port"/v1 judge.model=SmolLM2-135M-Instruct \
        judge.max_tokens=32 judge.timeout=300 judge.concurrency=2 judge.price_input=0.1 judge.price_output=0.4 "$@")
}
received() { grep -c 'Request received' "$work/server.log" || true; }
ledger() {
    "$python" - "$work/store/judge_cache.sqlite" <<'END'
import sqlite3, sys
file = sqlite3.connect(sys.argv[1])
count = lambda what: file.execute(f"SELECT COUNT(*) FROM {what}").fetchone()[0]
print(count("replies"), count("sent"), count("sent WHERE estimated"))
END
}
counts() {
    read -r replies charged estimated < <(ledger)
    echo "--- $1: $(received) requests received by the server; kept: $replies replies; charged: $charged ($estimated estimated)"
}

echo "=== 1. dry run: everything up to the judge, then the plan"
run judge.dry_run=true

echo "=== 2. the server"
weights=$(echo "$work"/store/backbone/smollm2-135m-*)
ln -sfn "$weights" "$work/SmolLM2-135M-Instruct" # the model's name, without a path
(cd "$work" && OMP_NUM_THREADS=1 exec "$python" -c 'from transformers.cli.transformers import main; main()' \
    serve SmolLM2-135M-Instruct --device cpu --port "$port" --host 127.0.0.1 >server.log 2>&1) &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
until grep -q "Uvicorn running" "$work/server.log"; do kill -0 $server; sleep 1; done

echo "=== 3. a cap of 12 requests"
run judge.max_calls=12 || echo "--- exit code $?"
counts "after the cap"

echo "=== 4. without the cap, killed with -9 on the way"
run >"$work/killed.log" 2>&1 &
until [ "$(received)" -ge 40 ]; do sleep 0.2; done
kill -9 "$(cat "$work/pid")"
wait $! || true
cat "$work/killed.log"
counts "after kill -9"

echo "=== 5. the same command again"
run
counts "after the resume"

echo "=== 6. and again"
run
counts "after the finished run"

echo "=== 7. the judgments deleted, the replies kept"
rm -r "$work"/store/judge/openai-* "$work"/store/pws
run
counts "after judging from the replies"

echo "=== 8. what was counted"
"$python" -m gradsift.evaluation.records "$work"/store/judge/openai-*/judgments.jsonl
