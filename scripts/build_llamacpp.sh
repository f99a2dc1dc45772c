#!/bin/sh
# Compiles llama.cpp's backend for this machine's GPU beside the installed package:
#
#     scripts/build_llamacpp.sh [auto|cpu|cuda|rocm|vulkan|metal] [--dry-run] [--arch 75,80,…]
#
# The same as `tabagent-model build-backend`, with the Python of this checkout's .venv if there is one.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
"$python" -c 'import tabagent_model' 2>/dev/null || {
    echo "tabagent_model is not installed for $python: run \`make try\` first, or \`pip install .\`" >&2
    exit 1
}
exec "$python" -m tabagent_model build-backend "$@"
