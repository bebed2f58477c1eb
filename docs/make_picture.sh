#!/usr/bin/env bash
# Recreates docs/report.png from runs/quickstart/report.html (after `make demo`). Needs Chromium.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars --user-data-dir="$folder/profile" \
  --virtual-time-budget=2000 --blink-settings=preferredColorScheme=1 --window-size=1280,3400 \
  --screenshot="$folder/raw.png" "file://$PWD/runs/quickstart/report.html" 2> /dev/null
.venv/bin/python - "$folder/raw.png" <<'PYTHON'
import sys

import numpy as np
from PIL import Image

image = Image.open(sys.argv[1]).convert("RGB")
pixels = np.asarray(image)
filled = np.flatnonzero((pixels != pixels[-1, 0]).any(axis=(1, 2)))
# The figures and plots; the table below them is for the page.
image = image.crop((0, 0, image.width, min(image.height, filled[-1] + 40, 1025)))
image.quantize(96, dither=Image.Dither.NONE).save("docs/report.png", optimize=True)
PYTHON
