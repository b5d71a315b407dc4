#!/usr/bin/env bash
# Sets of parts: PACO (on LVIS' pictures), PartImageNet and Pascal-Part.
#
#     bash scripts/prepare/parts.sh [--check]       see scripts/prepare/common.sh
#
# PACO's annotations from https://github.com/facebookresearch/paco and Pascal VOC 2010 from
# http://host.robots.ox.ac.uk/pascal/VOC/voc2010, without an account. By hand: PartImageNet, from
# https://github.com/TACJu/PartImageNet, and Pascal-Part as a COCO file (the authors publish MATLAB files;
# https://github.com/facebookresearch/VLPart says how a COCO file is had). PACO's Ego4D part needs Ego4D's own agreement (https://ego4d-data.org); it is read from the
# release's JSON only (scripts/prepare/release.sh). Terms: README.md, "Licences".
#
#     data/paco/paco_lvis_v1_train.json                         pictures: bash scripts/prepare/coco.sh
#     data/partimagenet/train.json                              one COCO file
#     data/partimagenet/images/train/…                           pictures, as it names them
#     data/pascal_part/train.json                               one COCO file
#     data/pascal_part/VOCdevkit/VOC2010/JPEGImages/…
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"
fetch_archive paco_lvis_v1.zip data/paco https://dl.fbaipublicfiles.com/paco/annotations/paco_lvis_v1.zip
place paco paco_lvis_v1_train.json data/paco
fetch_archive VOCtrainval_03-May-2010.tar data/pascal_part \
  http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar
by_hand "PartImageNet: https://github.com/TACJu/PartImageNet; the annotations of the training split as one COCO file." \
  data/partimagenet/train.json data/partimagenet/images/train
by_hand "Pascal-Part as one COCO file, whose categories are named object:part (else set data.sources.pascal_part.separator):
   see the page on data sets of https://github.com/facebookresearch/VLPart." \
  data/pascal_part/train.json
finish
