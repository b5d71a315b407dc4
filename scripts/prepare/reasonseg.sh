#!/usr/bin/env bash
# ReasonSeg: pictures, each with a JSON of questions and drawn shapes.
#
#     bash scripts/prepare/reasonseg.sh [--check]   see scripts/prepare/common.sh
#
# By hand, from the links at https://github.com/dvlab-research/LISA ("ReasonSeg"). Terms: README.md, "Licences".
# The archives train.zip, val.zip and test.zip may be put into data/downloads/reasonseg; they are unpacked then.
#
#     data/reasonseg/train/NAME.jpg, NAME.json      239 of each
#     data/reasonseg/val/NAME.jpg, NAME.json        200
#     data/reasonseg/test/NAME.jpg, NAME.json       779
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"
for split in train val test; do
  archive="$downloads/reasonseg/$split.zip"
  if [ ! -e "data/reasonseg/$split" ] && [ -e "$archive" ]; then
    unpack "$archive" data/reasonseg
  fi
done
by_hand "ReasonSeg: download the archives from the links at https://github.com/dvlab-research/LISA, put them into
   $downloads/reasonseg and start this again; or unpack them yourself." \
  data/reasonseg/train data/reasonseg/val data/reasonseg/test
finish
