"""The embedded language model: a small GPT-2 and its corpus, so that everything runs offline and against known truth."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
