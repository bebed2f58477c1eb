#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in about ten minutes: the compiled kernels against their references, a run, with two GPUs or
# more the same run of two processes over NCCL, and the speed of a training step. Results go to runs/gpu.
#
#     bash docs/scripts/gpu.sh
#
# Needs .venv with a CUDA build of torch: make install, then .venv/bin/pip install torch==2.13.0 from PyTorch's index.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=runs/gpu
mkdir -p "$out"
.venv/bin/python -c "import torch; assert torch.cuda.is_available(), 'no CUDA GPU'; print(torch.cuda.get_device_name(), torch.__version__)" | tee "$out/device.txt"
git rev-parse HEAD >> "$out/device.txt"
timeout 240 .venv/bin/pytest -n 0 -q -m gpu tests 2>&1 | tee "$out/tests.txt"
small=(harvest.tokens=200000 tokens=500000 harvest.store="$out/activations" precision=float32)
timeout 120 .venv/bin/sparsary train recipes/quickstart.yaml "${small[@]}" out_dir="$out/alone"
gpus=$(.venv/bin/python -c "import torch; print(torch.cuda.device_count())")
if test "$gpus" -gt 1; then
  timeout 120 .venv/bin/torchrun --standalone --nproc-per-node 2 -m sparsary train recipes/quickstart.yaml "${small[@]}" out_dir="$out/two"
fi
tail -n 1 "$out"/*/metrics.jsonl
timeout 180 .venv/bin/sparsary bench gpu --json "$out/bench.json"
