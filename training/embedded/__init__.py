"""Embedded language model: a small GPT-2 and its synthetic corpus, for offline use with known ground truth."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
