# Functions of the scripts in this folder, which source it. Not a script by itself.
#
#     bash scripts/prepare/NAME.sh            downloads what can be had without an account into data/, says what must be
#                                             fetched by hand and where to put it, then checks what is there
#     bash scripts/prepare/NAME.sh --check    downloads nothing, checks only; exit status 1: something is missing or wrong
#
# Started again, a script goes on where it was: what was downloaded and unpacked is left alone. data/ may be a link to a
# large disk. Archives stay in data/downloads, which may be deleted when everything is unpacked. PYTHON chooses the
# interpreter (default: .venv/bin/python, if it is there).
#
# No download could be tried where this was written, as there was no network. Where an address has changed, the script
# stops and names it; the project's page, named in its head, has the new one.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

downloads=data/downloads
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  [ ! -x .venv/bin/python ] || python=.venv/bin/python
fi

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# check: compare what is there with what should be there. The name of the script is what is checked.
check() { "$python" scripts/prepare/check.py "$(basename "$0" .sh)"; }

# start "$@": with --check, check and end there.
start() {
  case "$*" in
  "") mkdir -p "$downloads" ;;
  --check)
    check || exit $?
    exit 0
    ;;
  *) die "usage: bash $0 [--check]" ;;
  esac
}

needs_command() { command -v "$1" >/dev/null || die "$1 is needed and not installed${2:+: $2}"; }

# fetch FILE URL...: download to FILE, unless it is there; the first address that answers. A part of it is gone on with.
fetch() {
  local file=$1 url part
  shift
  [ ! -e "$file" ] || return 0
  needs_command curl
  mkdir -p "$(dirname "$file")"
  for url in "$@"; do
    part="$file.part-$(printf %s "$url" | cksum | cut -d' ' -f1)" # parts from two addresses must not be mixed
    echo "== $url"
    if curl -fL --retry 3 --connect-timeout 30 -C - -o "$part" "$url"; then
      mv "$part" "$file"
      return 0
    fi
    echo "cannot be downloaded: $url (what there is of it: $part)" >&2
  done
  die "$file: no address answered; fetch it by hand (the head of $0 names the page), put it there and start this again"
}

# unpack ARCHIVE FOLDER: unpack a .zip or .tar into FOLDER, once.
unpack() {
  local archive=$1 folder=$2 stamp
  stamp="$folder/.unpacked-$(basename "$archive")"
  [ ! -e "$stamp" ] || return 0
  mkdir -p "$folder"
  echo "== unpacking $archive into $folder"
  case "$archive" in
  *.zip)
    needs_command unzip
    unzip -q -o "$archive" -d "$folder"
    ;;
  *.tar | *.tar.gz | *.tgz)
    needs_command tar
    tar -xf "$archive" -C "$folder"
    ;;
  *) die "$archive: neither .zip nor .tar" ;;
  esac
  touch "$stamp"
}

# fetch_archive NAME FOLDER URL...: download an archive and unpack it into FOLDER, unless that was done.
fetch_archive() {
  local name=$1 folder=$2
  shift 2
  if [ -e "$folder/.unpacked-$name" ]; then
    echo "$name: unpacked already in $folder"
    return 0
  fi
  fetch "$downloads/$name" "$@"
  unpack "$downloads/$name" "$folder"
}

# fetch_dataset NAME FOLDER: a data set of the hub; hf goes on where it was.
fetch_dataset() {
  local name=$1 folder=$2 hf=hf
  [ ! -x .venv/bin/hf ] || hf=.venv/bin/hf
  if [ -e "$folder/.complete" ]; then
    echo "$name: downloaded already to $folder"
    return 0
  fi
  needs_command "$hf" "pip install huggingface_hub"
  "$hf" download --repo-type dataset "$name" --local-dir "$folder" ||
    die "$name cannot be downloaded. Does its card (https://huggingface.co/datasets/$name) ask for an account? \
Then accept its terms there, run 'hf auth login' and start again."
  touch "$folder/.complete"
}

# place FOLDER FILE IN...: link the one file of that name below IN to data/FOLDER/FILE, unless something is there.
place() {
  local folder=$1 file=$2 found
  shift 2
  mkdir -p "data/$folder"
  [ ! -e "data/$folder/$file" ] || return 0
  found=$(find "$@" -type f -name "$file")
  case "$found" in
  "") echo "$file: not found by that name below $*" ;;
  *$'\n'*) printf '%s: several of that name, link the right one to data/%s/%s yourself:\n%s\n' "$file" "$folder" "$file" "$found" ;;
  *) ln -s "../${found#data/}" "data/$folder/$file" ;;
  esac
}

# by_hand TEXT PATH...: what to do, unless all paths are there.
by_hand() {
  local text=$1 path lacking=
  shift
  for path in "$@"; do
    [ -e "$path" ] || lacking+="
     $path"
  done
  [ -n "$lacking" ] || return 0
  printf '\n== by hand: %s\n   What is missing then has its place here:%s\n' "$text" "$lacking"
}

# finish: what there is now.
finish() {
  echo
  check && return 0
  echo "not complete yet, see above; what was downloaded stays, so start this again afterwards" >&2
  exit 1
}
