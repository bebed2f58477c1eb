"""One small random model, and pairs of prompts for it."""

import pytest


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def pairs(random_pairs):
    return random_pairs(n=3)
