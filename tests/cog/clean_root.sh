#!/bin/sh
# A stand-in for the container, where there is no Docker: a clean Debian root with nothing but Python 3.11 and the pinned
# requirements that cog.yaml asks for, in which both of Cog's servers train and draw.
#     sudo sh tests/cog/clean_root.sh FOLDER        needs root, debootstrap, git, and pip for Python 3.11; Linux
# FOLDER must not exist; afterwards it holds the root, to be looked at and removed.
#
# It proves that the requirements are complete, that they install together, and that the checkout runs on them with no
# file from elsewhere. It does not prove the image that `cog build` makes: not its base image, CUDA or cuDNN, not the
# GPU, and not Cog's own reading of cog.yaml and of the signatures (tests/test_cog.py knows its rules).
set -eu
here=$(cd "$(dirname "$0")/../.." && pwd)
[ $# -eq 1 ] || { echo "error: give the FOLDER for the clean root" >&2; exit 2; }
[ ! -e "$1" ] || { echo "error: $1 exists: give the name of a new folder" >&2; exit 2; }
python=${PYTHON:-python3.11}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "error: set PYTHON to a Python 3.11" >&2; exit 2; }
started=$(date +%s)
step() { echo "== $(($(date +%s) - started)) s: $*"; }

step "a minimal Debian"
# bookworm's own Python is 3.11, which cog.yaml asks for
debootstrap --variant=minbase --include=python3,python3-venv bookworm "$1" ${DEBIAN_MIRROR:-} > "$1.log" 2>&1 ||
    { tail -5 "$1.log" >&2; exit 1; }
root=$(cd "$1" && pwd)
mkdir -p "$root/src" "$root/wheels"

step "the pinned requirements"
# fetched outside, by this machine's pip as it is set up; installed inside, from these files alone
sed -n 's/ *python_requirements: *//p' "$here/cog.yaml" > "$root/wheels/name"
requirements="$here/$(cat "$root/wheels/name")"
"$python" -m pip download -q --only-binary=:all: -r "$requirements" -d "$root/wheels"
cp "$requirements" "$root/src/requirements.txt"
chroot "$root" python3 -m venv /venv
chroot "$root" /venv/bin/python -m pip install -q --no-index --find-links /wheels -r /src/requirements.txt
chroot "$root" /venv/bin/python -m pip check
rm -r "$root/wheels"

step "the checkout"
git -C "$here" archive HEAD | tar -x -C "$root/src"

step "train and draw through Cog's servers"
# its own mounts, which go with it, and its own network: nothing but 127.0.0.1
unshare --mount --net --pid --fork sh -ec '
    ip link set lo up
    mount -t proc proc "$1/proc"
    mount -t tmpfs tmpfs "$1/dev/shm" 2>/dev/null || true
    exec chroot "$1" env -i PATH=/venv/bin:/usr/bin:/bin HOME=/root LANG=C.UTF-8 HF_HUB_OFFLINE=1 \
        sh -c "cd /src && exec python -m tests.cog.round_trip /tmp/work"
' sh "$root"
step "done; $(du -sm --exclude=proc "$root" | cut -f1) MiB, of which the requirements $(du -sm "$root/venv" | cut -f1) MiB"
