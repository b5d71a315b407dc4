#!/usr/bin/env bash
# LVIS v1's training annotations. Its pictures are COCO's: bash scripts/prepare/coco.sh.
#
#     bash scripts/prepare/lvis.sh [--check]        see scripts/prepare/common.sh
#
# From https://www.lvisdataset.org, without an account. Terms: README.md, "Licences".
#
#     data/lvis/lvis_v1_train.json
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"
fetch_archive lvis_v1_train.json.zip data/lvis https://dl.fbaipublicfiles.com/LVIS/lvis_v1_train.json.zip
finish
