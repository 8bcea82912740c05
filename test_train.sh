#!/bin/sh
# The whole job in one command: makes .venv, trains the embedded base on a demo sprite, draws it and scores it.
#     sh test_train.sh               the first demo sprite -> outputs/demo
#     sh test_train.sh SPRITE.png    any RGBA drawing      -> outputs/demo_SPRITE
# Ends with a non-zero code if anything failed.
set -eu
export PATH # an empty environment leaves it to the shell
here=$(cd "$(dirname "$0")" && pwd)

if [ $# -gt 0 ]; then
    [ -f "$1" ] || { echo "error: $1 does not exist: give the path of an RGBA PNG" >&2; exit 2; }
    sprite="$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
    out="outputs/demo_$(basename "$1" .png)"
    cd "$here"
else
    cd "$here"
    set -- toybox/sprites/*.png
    sprite=$1
    out=outputs/demo
fi

sh setup_venv.sh
python=.venv/bin/python
started=$(date +%s)
rm -rf "$out" # so that what is checked below comes from this run
mkdir -p "$out"

echo "== a data set of $(basename "$sprite")"
$python -m toybox.concept --sprite "$sprite" --count 12 --seed 0 --out "$out/data.zip"
echo "== training"
$python train.py recipes/toybox_pivotal.yaml --input_images "$out/data.zip" --output_dir "$out"
echo "== drawing"
$python predict.py --weights "$out/trained_model.tar" --prompt "TOK on a striped blue background on the left" \
    --num_outputs 4 --seed 0 --output_dir "$out/drawn"

for file in "$out/trained_model.tar" "$out/report.html" "$out"/samples/*.png "$out/drawn/0004_seed3.png"; do
    [ -s "$file" ] || { echo "error: $file is missing" >&2; exit 1; }
done
echo "== done in $(($(date +%s) - started)) s: $out/trained_model.tar, $out/report.html, $out/samples; the scores:"
$python -m toybox.score adapter --weights "$out/trained_model.tar" --sprite "$sprite"
