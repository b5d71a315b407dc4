#!/usr/bin/env bash
# COCO's pictures (train2014 for the referring sets, train2017 for everything else) and its instances of 2017.
#
#     bash scripts/prepare/coco.sh [--check]        see scripts/prepare/common.sh
#
# From https://cocodataset.org, without an account: 13 GB + 18 GB of pictures, 241 MB of annotations.
# Terms: README.md, "Licences"; the pictures are from Flickr and belong to their authors.
#
#     data/coco/train2014/COCO_train2014_000000581857.jpg …     82,783
#     data/coco/train2017/000000391895.jpg …                   118,287
#     data/coco/annotations/instances_train2017.json
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"
fetch_archive annotations_trainval2017.zip data/coco http://images.cocodataset.org/annotations/annotations_trainval2017.zip
fetch_archive train2014.zip data/coco http://images.cocodataset.org/zips/train2014.zip
fetch_archive train2017.zip data/coco http://images.cocodataset.org/zips/train2017.zip
finish
