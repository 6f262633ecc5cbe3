#!/usr/bin/env bash
# Every figure of a GPU by one command, from the checkout and in an environment that has the project:
#   bash benchmarks/gpu.sh [options of benchmarks/gpu.py]
# Prints tables, and writes gpu-bench.json. Some minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
if command -v nvidia-smi > /dev/null; then nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader; fi
exec "${PYTHON:-python}" benchmarks/gpu.py --device cuda "$@"
