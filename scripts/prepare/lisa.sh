#!/usr/bin/env bash
# LISA++'s instance data: questions about COCO's training pictures of 2017, answered by ids of COCO's annotations.
#
#     bash scripts/prepare/lisa.sh [--check]        see scripts/prepare/common.sh
#
# By hand, from the links at https://github.com/dvlab-research/LISA. Pictures and instances_train2017.json:
# bash scripts/prepare/coco.sh. Terms: README.md, "Licences".
#
#     data/lisa_plus/instance.json
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"
by_hand "LISA++: download its instance segmentation data (JSON) from the links at https://github.com/dvlab-research/LISA." \
  data/lisa_plus/instance.json
finish
