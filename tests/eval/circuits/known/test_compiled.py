"""Compiled programs: their circuits, derived from the program, are those that exact patching finds."""

import pytest

from sparsary.eval.circuits.known.compiled import EDGES, program


@pytest.mark.parametrize("name", EDGES)
def test_exact_patching_finds_the_program_s_circuit(name, check_truth, shared_data):
    known = program(name, shared_data / "models" / "toy" / name, n_pairs=6)
    # The compiler's softmax is not quite hard. Where reverse selects nothing, which it never does, its query means BOS.
    fallback = ("embed->a3.h0.q",) if name == "tracr_reverse" else ()
    check_truth(known, floor=1e-2, leak=1e-6, fallback=fallback, n_contexts=12)


@pytest.mark.parametrize("name", EDGES)
def test_clean_prompts_are_right_and_axes_are_named(name, shared_data):
    known = program(name, shared_data / "models" / "toy" / name, n_pairs=20)
    clean, corrupted = (known.pairs.measure(known.model.logits(ids)) for ids in (known.pairs.clean, known.pairs.corrupted))
    assert (clean > corrupted + 0.1).all()
    assert len(known.directions) == known.config.d_model
    assert known.directions["one"].argmax() == list(known.directions).index("one")
    # What the embedding writes of BOS is its token and the constant.
    assert known.module.wte.weight[0] @ known.directions["tokens:BOS"] == 1
    assert known.module.wte.weight[0] @ known.directions["one"] == 1


def test_other_programs_are_refused():
    with pytest.raises(ValueError, match=r"name: expected one of tracr_reverse, .*got 'tracr_sort'"):
        program("tracr_sort", "nowhere")
