#!/usr/bin/env bash
# Evaluation data that belongs to no training set: GSEval and SA-Co.
#
#     bash scripts/prepare/gseval.sh [--check]      see scripts/prepare/common.sh
#
# By hand: GSEval from the links at https://github.com/hustvl/GroundingSuite, SA-Co from those at
# https://github.com/facebookresearch/sam3. Terms: README.md, "Licences".
#
#     data/gseval/GroundingSuite-Eval.jsonl         pictures as its image_path names them, below data/gseval
#     data/saco/test.json                           one COCO file of (picture, phrase) pairs
#     data/saco/images/                             pictures as file_name names them
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"
by_hand "GSEval: https://github.com/hustvl/GroundingSuite has the links to annotations and pictures." \
  data/gseval/GroundingSuite-Eval.jsonl
by_hand "SA-Co: https://github.com/facebookresearch/sam3 has the links. One of its JSON files is one benchmark;
   benchmark.file and benchmark.image_root name others than these." \
  data/saco/test.json data/saco/images
finish
