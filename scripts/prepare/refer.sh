#!/usr/bin/env bash
# The referring sets: RefCOCO, RefCOCO+, RefCOCOg, RefCLEF (pickled refs and COCO instances) and gRefCOCO (JSON).
#
#     bash scripts/prepare/refer.sh [--check]       see scripts/prepare/common.sh
#
# From https://github.com/lichengunc/refer, without an account; where its server does not answer, from the Internet
# Archive's copy. gRefCOCO by hand, from https://github.com/henghuiding/gRefCOCO. Pictures: bash scripts/prepare/coco.sh.
# Terms: README.md, "Licences".
#
#     data/refer/refcoco/refs(unc).p      data/refer/refcoco/instances.json
#     data/refer/refcoco+/refs(unc).p     data/refer/refcoco+/instances.json
#     data/refer/refcocog/refs(umd).p     data/refer/refcocog/instances.json
#     data/refer/refclef/refs(unc).p      data/refer/refclef/instances.json
#     data/refer/grefcoco/grefs(unc).json data/refer/grefcoco/instances.json
#
# RefCLEF is here for those who want the set itself: no command reads it, as the release trains on its own JSON of it
# (scripts/prepare/release.sh), which needs the pictures of SAIAPR TC-12.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"
server=https://bvisionweb1.cs.unc.edu/licheng/referit/data
for set in refcoco refcoco+ refcocog refclef; do
  fetch_archive "$set.zip" data/refer "$server/$set.zip" "https://web.archive.org/web/2022/$server/$set.zip"
done
by_hand "gRefCOCO: download both files from the links at https://github.com/henghuiding/gRefCOCO." \
  "data/refer/grefcoco/grefs(unc).json" data/refer/grefcoco/instances.json
finish
