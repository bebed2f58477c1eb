"""Files with damaged bytes or meaning: every reader returns or says what is wrong. ``make fuzz`` runs it for long."""

import importlib.util
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def beside(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


targets = beside("targets")
# Examples of each target; `make fuzz` asks for more, in another order each time.
EXAMPLES = int(os.environ.get("SPARSARY_FUZZ_EXAMPLES", "15"))
BOUNDED = settings(
    max_examples=EXAMPLES,
    derandomize="SPARSARY_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    # Time is not asserted; a hang is the test's own limit.
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("name", list(targets.TARGETS))
def test_a_damaged_file_is_read_or_refused(name, tmp_path):
    target = targets.TARGETS[name]
    valid, folder = tmp_path / "valid", tmp_path / "damaged"
    valid.mkdir()
    target.build(valid)
    target.read(targets.copied(valid, folder))

    @BOUNDED
    @given(draw=st.randoms(use_true_random=False))
    def read(draw):
        targets.disturb(target, valid, folder, draw)
        targets.check(target, folder)

    read()
