#!/usr/bin/env bash
# The whole system on a laptop's CPU: environment, tiny world, training, evaluation, comparison with the shipped model.
#
#     bash scripts/quickstart.sh
#
# Writes outputs/quickstart/ (checkpoint, metrics.json, report.md, report.html, gallery.png). Interrupted, it goes on
# where it was when started again. PYTHON chooses the interpreter, OUT another folder than outputs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-outputs/quickstart}
world=data/tiny_world
venv=${VENV:-.venv}
started=$(date +%s)
mkdir -p "$out"

say() { printf '\n== %s (%d min %02d s)\n' "$1" $((($(date +%s) - started) / 60)) $((($(date +%s) - started) % 60)); }

bash scripts/environment.sh "$venv"
run() { "$venv/bin/python" -m "$@"; }

say "tiny world in $world"
run instructsam.make_tiny_world --root "$world" --train 5000 --val 120

# Two threads that wait for each other spin; passive waiting leaves the cores to whoever has work.
export OMP_WAIT_POLICY=PASSIVE ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
say "training on top of the pretrained detector and VLM in checkpoints/, two processes"
run torch.distributed.run --standalone --nproc-per-node 2 -m \
  instructsam.train experiment=tiny_world output_dir="$out/training"

say "evaluation on held-out scenes, and of the shipped model on the same"
rm -rf "$out/checkpoint"
cp -r "$out/training/checkpoint" "$out/checkpoint"
settings=(batch_size=32 max_new_tokens=32)
run instructsam.evaluate checkpoint=checkpoints/tiny output_dir="$out/shipped" "${settings[@]}" restart=true \
  query_reliance=false >"$out/shipped.log" 2>&1 &
shipped=$!
trap 'kill "$shipped" 2>/dev/null || true' EXIT
run instructsam.evaluate checkpoint="$out/checkpoint" output_dir="$out" "${settings[@]}" restart=true untrained=true
wait "$shipped" || { cat "$out/shipped.log" >&2; exit 1; }

say "A: this model, B: the shipped one"
run instructsam.compare "$out/metrics.json" "$out/shipped/metrics.json" --changed 3
say "done: $out"
