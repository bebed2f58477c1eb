import pytest

from sparsary.sae.suggestions import did_you_mean, require_choice


@pytest.mark.parametrize(
    ("word", "expected"),
    [("topkk", " Did you mean 'topk'?"), ("kk", ""), ("rleu", " Did you mean 'relu'?"), ("", ""), ("attention", "")],
)
def test_only_a_word_that_is_close_is_suggested(word, expected):
    assert did_you_mean(word, ["relu", "topk"]) == expected


def test_a_choice_is_returned_and_anything_else_is_refused_with_the_list():
    assert require_choice("--task", "scr", {"scr": 1, "tpp": 2}) == "scr"
    with pytest.raises(ValueError, match=r"^--task: expected one of scr, tpp here, got 'scrr'\. Did you mean 'scr'\?$"):
        require_choice("--task", "scrr", ["scr", "tpp"], " here")
    with pytest.raises(ValueError, match=r"^k: expected one of scr, got 3\.$"):
        require_choice("k", 3, ["scr"])
