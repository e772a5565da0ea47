#!/usr/bin/env bash
# Fetch what a machine without a package index lacks for check.py, as wheels, and try them.
#
#   wheels.sh FOLDER          Python 3.12; another: PYTHON=python3.13 wheels.sh FOLDER
#
# The machine has torch with CUDA, lightning 2.6, accelerate 1.15, peft and what they need (README.md lists it).
# There: python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl; PYTHONPATH=SITE python3 check.py
set -euo pipefail

PYTHON=${PYTHON:-python3.12}
FOLDER=${1:?Give the folder for the wheels: wheels.sh FOLDER}

# transformers, datasets and what hfbridge pins beside them; DeepSpeed; Liger's kernels. pyarrow only where the
# machine's own is older than 24: PYARROW=1.
PACKAGES=(
  "transformers>=5.23,<5.24" "datasets>=5.2,<6" "evaluate>=0.4.6" "dill<0.4.2" "multiprocess<0.70.20"
  "huggingface-hub>=1.31,<3" "tokenizers>=0.23.1,<0.24" "pydantic>=2" annotated-types hjson liger-kernel
)
[ -z "${PYARROW:-}" ] || PACKAGES+=("pyarrow>=24")

mkdir -p "$FOLDER"
PLATFORMS=()
for glibc in 39 35 34 31 28 27 24 17; do PLATFORMS+=(--platform "manylinux_2_${glibc}_x86_64"); done
PLATFORMS+=(--platform manylinux2014_x86_64)
VERSION=$("$PYTHON" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
FOR=(--no-deps --only-binary=:all: --implementation cp --python-version "$VERSION" "${PLATFORMS[@]}")

"$PYTHON" -m pip download -q "${FOR[@]}" -d "$FOLDER" "${PACKAGES[@]}"
# pydantic wants one version of its core, which its metadata names.
CORE=$(unzip -p "$FOLDER"/pydantic-[0-9]*.whl '*/METADATA' | sed -n 's/^Requires-Dist: \(pydantic-core==[^ ;]*\).*/\1/p')
"$PYTHON" -m pip download -q "${FOR[@]}" -d "$FOLDER" "$CORE" typing-inspection typing-extensions
# DeepSpeed is published as a source only; its operators are compiled where they are used.
DS_BUILD_OPS=0 "$PYTHON" -m pip wheel -q --no-deps -w "$FOLDER" "deepspeed>=0.18,<1"

# Do they install beside each other without an index, and does Python import what needs no torch?
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
"$PYTHON" -m pip install -q --no-index --no-deps --target "$SITE" "$FOLDER"/*.whl
PYTHONPATH="$SITE" "$PYTHON" - <<'CHECK'
import importlib

for name in ("annotated_types", "dill", "hjson", "multiprocess", "pydantic", "pydantic_core", "tokenizers"):
    importlib.import_module(name)
CHECK
du -sh "$FOLDER"
