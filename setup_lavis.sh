#!/bin/sh
# Makes .venv-lavis, the environment of captioner lavis: `sh setup_lavis.sh`. Quick when there is nothing to do.
# salesforce-lavis wants a transformers of 2022, so it has an environment of its own, which takes torch, numpy and
# Pillow from .venv: a .pth file puts .venv's packages behind its own.
set -eu
cd "$(dirname "$0")"
export PATH
sh setup_venv.sh

folder=.venv-lavis
mark="$folder/installed-requirements-lavis.txt"
if cmp -s requirements-lavis.txt "$mark"; then
    exit 0
fi
rm -rf "$folder"
.venv/bin/python -m venv "$folder"
main=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$main')" >"$own/atelier.pth" # with the .pth files that lie there
"$folder/bin/python" -m pip install -qq --no-deps --ignore-installed -r requirements-lavis.txt
cp requirements-lavis.txt "$mark"
