#!/usr/bin/env bash
# RoboRefIt: referring expressions about table scenes, masks as PNG files.
#
#     bash scripts/prepare/roborefit.sh [--check]   see scripts/prepare/common.sh
#
# By hand, from the links at https://github.com/luyh20/VL-Grasp. Terms: README.md, "Licences".
# Names of pictures and masks in train.json count from data/roborefit; what its fields are called stands in
# configs/source/roborefit.yaml: compare. The test splits come with the release: bash scripts/prepare/release.sh.
#
#     data/roborefit/train.json
#     data/roborefit/...                            pictures and masks, as train.json names them
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"
by_hand "RoboRefIt: download the data set from the links at https://github.com/luyh20/VL-Grasp, unpack it into
   data/roborefit, and rename (or link) the JSON of its training split." \
  data/roborefit/train.json
finish
