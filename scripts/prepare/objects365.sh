#!/usr/bin/env bash
# Objects365 v2, training split: boxes of 365 categories.
#
#     bash scripts/prepare/objects365.sh [--check]  see scripts/prepare/common.sh
#
# By hand, from https://www.objects365.org, which asks for an account. Terms: README.md, "Licences".
#
#     data/objects365/zhiyuan_objv2_train.json
#     data/objects365/train/patch0/…
#
# In the JSON the names begin with images/v1/ or images/v2/; configs/source/objects365.yaml turns that into train/.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"
by_hand "Objects365 v2: with an account at https://www.objects365.org download the training annotations and the
   archives of training pictures, and unpack these below data/objects365/train (patch0, patch1, ...)." \
  data/objects365/zhiyuan_objv2_train.json data/objects365/train
finish
