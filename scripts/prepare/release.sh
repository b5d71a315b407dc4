#!/usr/bin/env bash
# The release's own data: the training and evaluation JSON of both stages, Inst2Seg and Inst2Seg-Bench.
#
#     bash scripts/prepare/release.sh [--check]     see scripts/prepare/common.sh
#
# From the hub, data sets CircleRadon/instructsam_training_eval_data, CircleRadon/Inst2Seg and CircleRadon/Inst2Seg-Bench.
# Terms: their cards, and those of the sets that they are made from (README.md, "Licences").
#
#     data/instructsam_train/refcoco.json …         what configs/data/stage1.yaml and stage2.yaml name
#     data/instructsam_eval/grefcoco_val.json …     what configs/benchmark/*_release.yaml name
#     data/roborefit/roborefit_testA.json, roborefit_testB.json
#     data/inst2seg/test.json                       Inst2Seg-Bench
#     data/images/                                  pictures, as "image" in the training JSON names them
#
# How the JSON lies on the hub is not known here, so it is downloaded to data/hub, looked for by name and linked to these
# places; what is not found by name is told. It holds no pictures of COCO, LVIS, Objects365 and so on: get those with the
# other scripts and link their folders into data/images; the check names the pictures that the first records want.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"

hub=data/hub
fetch_dataset CircleRadon/instructsam_training_eval_data "$hub/instructsam"
fetch_dataset CircleRadon/Inst2Seg "$hub/inst2seg"
fetch_dataset CircleRadon/Inst2Seg-Bench "$hub/inst2seg_bench"
while IFS= read -r -d '' archive; do
  unpack "$archive" "$(dirname "$archive")"
done < <(find "$hub" -type f \( -name '*.zip' -o -name '*.tar' -o -name '*.tar.gz' -o -name '*.tgz' \) -print0)

for name in refcoco refcoco+ refcocog grefcoco_single refclef roborefit reason_seg_cat coco_instances lvis_v1_train \
  paco_lvis partimagenet pascal_part paco_ego4d roboafford_paco lisa_plus_cot lisa_plus_instance; do
  place instructsam_train "$name.json" "$hub/instructsam"
done
place instructsam_train inst2seg.json "$hub/instructsam" "$hub/inst2seg"
# Sets in parts, whatever their numbers look like.
for name in mapillary obj365_cat obj365_phrase; do
  while IFS= read -r file; do
    place instructsam_train "$(basename "$file")" "$hub/instructsam"
  done < <(find "$hub/instructsam" -type f -name "$name*.json")
done
for split in val testA testB; do place instructsam_eval "grefcoco_$split.json" "$hub/instructsam"; done
for split in val test; do place instructsam_eval "reasonseg_$split.json" "$hub/instructsam"; done
for split in testA testB; do place roborefit "roborefit_$split.json" "$hub/instructsam"; done
# The benchmark names its pictures relative to its own folder.
[ -e data/inst2seg ] || ln -s "${hub#data/}/inst2seg_bench" data/inst2seg

echo
echo "JSON files that were downloaded and are linked from nowhere above, if any:"
while IFS= read -r file; do
  [ -n "$(find data/instructsam_train data/instructsam_eval data/roborefit -lname "../${file#data/}")" ] || echo "     $file"
done < <(find "$hub/instructsam" "$hub/inst2seg" -type f -name '*.json')
by_hand "pictures: link the folders that the training JSON names into data/images (ln -s ../coco/train2014 data/images/...)." \
  data/images
by_hand "Inst2Seg-Bench: link its JSON to the name that the benchmark reads, or name it: benchmark.file=NAME.json" \
  data/inst2seg/test.json
finish
