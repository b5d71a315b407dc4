#!/usr/bin/env bash
# The whole system on a laptop's CPU: environment, tiny world, training, evaluation, pictures.
#
#     bash scripts/quickstart.sh
#
# Writes outputs/quickstart/ (checkpoint, metrics.json, report.md, gallery.png). Interrupted, it goes on where it was
# when started again. PYTHON chooses the interpreter, OUT another folder than outputs/quickstart.
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
export OMP_WAIT_POLICY=PASSIVE
say "pretraining detector and VLM side by side, one core each"
run instructsam.train experiment=tiny_detector output_dir="$out/detector" trainer.progress_bar=false \
  >"$out/detector.log" 2>&1 &
detector=$!
trap 'kill "$detector" 2>/dev/null || true' EXIT
run instructsam.train experiment=tiny_vlm output_dir="$out/vlm"
echo "the VLM is ready; waiting for the detector (its log: $out/detector.log)"
# If it did not get through (stopped, or one left over from a killed quickstart was still at work), go on in front.
wait "$detector" || run instructsam.train experiment=tiny_detector output_dir="$out/detector"
trap - EXIT

say "training the bridge: the VLM's queries steer the detector"
run instructsam.train experiment=tiny_world output_dir="$out/bridge" \
  model.init.0.checkpoint="$out/detector/checkpoint" model.init.1.checkpoint="$out/vlm/checkpoint"

say "evaluation on held-out scenes"
rm -rf "$out/checkpoint"
cp -r "$out/bridge/checkpoint" "$out/checkpoint"
run instructsam.evaluate checkpoint="$out/checkpoint" output_dir="$out" untrained=true restart=true \
  batch_size=32 max_new_tokens=32
say "done: $out"
