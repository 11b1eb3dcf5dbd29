#!/usr/bin/env bash
# Prove that glmd runs with the oldest and the newest releases that pyproject.toml admits:
#
#   scripts/versions.sh oldest            # or newest; in a fresh environment, from the built wheel
#   scripts/versions.sh newest 3.13       # with another Python, which must be installed
#
# Builds the wheel, installs it with its dependencies and pytest into an empty environment, runs the quickstart there,
# and the tests of losses, heads, probes, compression and export. Needs uv; takes a quarter of an hour and 6 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

which=${1:?oldest or newest}
python=${2:-3.11}
case $which in
    oldest) resolution=lowest-direct ;;
    newest) resolution=highest ;;
    *) echo "versions.sh: $which is neither oldest nor newest" >&2; exit 2 ;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=1 PYTHONNOUSERSITE=1
unset PYTHONPATH

uv build --quiet --wheel --out-dir "$work/wheel" .
uv venv --quiet --python "$python" "$work/env"
export VIRTUAL_ENV=$work/env
uv pip install --quiet --resolution "$resolution" -r pyproject.toml && uv pip install --quiet --no-deps "$work"/wheel/*.whl
uv pip install --quiet pytest pytest-xdist hypothesis scikit-learn skeletoken
uv pip list 2>/dev/null | grep -iE '^(torch|transformers|tokenizers|accelerate|datasets|evaluate|numpy|safetensors|sentencepiece|protobuf) '

mkdir "$work/tests" && cp -r tests/. "$work/tests"
(cd "$work" && "$work/env/bin/glmd" run quickstart output_dir="$work/run" | tail -12)
tests=()
for name in losses linear_loss heads probes student compress companions export tokenizer; do
    tests+=("tests/test_$name.py")
done
cp pyproject.toml "$work" && cd "$work" # tests beside the installed package, not beside the checkout
"$work/env/bin/python" -m pytest -q -m "not real and not slow" "${tests[@]}"
