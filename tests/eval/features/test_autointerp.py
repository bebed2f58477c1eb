"""Explainer and scorers against a stub server that answers as told, well or badly."""

from contextlib import contextmanager

import httpx
import pytest

from sparsary.eval.features.autointerp import (
    ActivatingWindow,
    Evidence,
    explain_prompt,
    explanation_in,
    fuzzed,
    labels_in,
    score_explanations,
)
from sparsary.eval.features.llm_client import Endpoint, LlmUsage, LocalChat


def saying(text):
    return {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 100, "completion_tokens": 7}}


def knows_about_dogs(request):
    """Explains, and finds excerpts with "dog" in them, marked "dog" where there are marks."""
    system, prompt = (message["content"] for message in request["messages"])
    if "EXPLANATION:" in system:
        return saying("I think so.\nEXPLANATION: the word dog")
    excerpts = prompt.split("Excerpt ")[1:]
    wanted = "<<dog>>" if "marked are those" in system else "dog"
    return saying(f"Sure! {[int(wanted in excerpt) for excerpt in excerpts]}")


@pytest.fixture
def shown():
    def dog(i):
        return ActivatingWindow(("the", "dog", f"runs{i}", "far"), (0.0, 2.0, 0.3, 0.0))

    def cat(i):
        return ActivatingWindow(("the", "cat", f"sits{i}", "still"), (0.0, 0.0, 0.0, 0.0))

    return Evidence([dog(i) for i in range(7)], [dog(i) for i in range(10, 20)], [cat(i) for i in range(13)], 2.0)


@contextmanager
def endpoint(url, **arguments):
    waits = []
    chat = Endpoint(url, "stub-1", sleep=waits.append, **arguments)
    try:
        yield chat, waits
    finally:
        chat.close()


def test_a_good_model_explains_and_scores_one(shown, serving):
    with serving(knows_about_dogs) as (url, stub), endpoint(url, prices=(2.0, 10.0)) as (chat, _):
        result = score_explanations(shown, chat, chat)
    assert (result.text, result.detection, result.fuzzing, result.malformed) == ("the word dog", 1.0, 1.0, 0)
    assert result.details["detection"]["true_positives"] == 10
    assert result.details["detection"]["true_negatives"] == 13
    # One explanation, and 23 windows by fives, twice.
    assert (result.questions, len(stub.requests), chat.usage.requests) == (11, 11, 11)
    assert chat.usage.prompt_tokens == 1100
    assert chat.usage.cost == pytest.approx(11 * (100 * 2 + 7 * 10) / 1e6)
    assert all(request["model"] == "stub-1" and request["temperature"] == 0 for request in stub.requests)


def test_a_model_that_always_says_yes_scores_a_half(shown, serving):
    def yes(request):
        if "EXPLANATION:" in request["messages"][0]["content"]:
            return saying("EXPLANATION: anything")
        return saying(str([1] * request["messages"][1]["content"].count("Excerpt ")))

    with serving(yes) as (url, _), endpoint(url) as (chat, _):
        result = score_explanations(shown, chat, chat)
    assert (result.detection, result.fuzzing) == (0.5, 0.5)
    assert result.details["fuzzing"]["recall"] == 1


def test_answers_of_another_form_are_discarded_and_counted(shown, serving):
    answers = iter(["no list", "[1, 0]", "[1, 0, 2, 0, 1]", "[yes]", ""] * 9)

    def badly(request):
        explains = "EXPLANATION:" in request["messages"][0]["content"]
        return saying("EXPLANATION: dogs") if explains else saying(next(answers))

    with serving(badly) as (url, _), endpoint(url) as (chat, _):
        result = score_explanations(shown, chat, chat)
    assert (result.detection, result.fuzzing) == (None, None)
    assert (result.malformed, result.questions) == (10, 11)
    assert result.reasons["detection"] == "5 of 5 answers could not be parsed"


@pytest.mark.parametrize("body", [b"<html>", {"choices": []}, {"choices": [{"message": {"content": None}}]}, [], 3])
def test_a_reply_that_is_no_answer_is_no_explanation(shown, body, serving):
    with serving(lambda _request: body) as (url, _), endpoint(url) as (chat, _):
        result = score_explanations(shown, chat, chat)
    assert (result.text, result.malformed, result.questions) == (None, 1, 1)
    assert set(result.reasons) == {"text", "detection", "fuzzing"}


def test_a_busy_server_is_asked_again_after_what_it_asks_for(serving):
    replies = iter([(429, {}, {"Retry-After": "7"}), (503, {}, {}), (500, {}, {}), saying("there")])
    with serving(lambda _request: next(replies)) as (url, _), endpoint(url) as (chat, waits):
        assert chat.answer("s", "p") == "there"
    assert waits == [7.0, 2.0, 4.0]
    assert (chat.usage.requests, chat.usage.retries) == (4, 3)


def test_a_refusal_is_said_at_once_and_the_key_is_sent(monkeypatch, serving):
    monkeypatch.setenv("MY_KEY", "secret")
    with (
        serving(lambda _request: (401, {"error": "bad key"}, {})) as (url, stub),
        endpoint(url, key_env="MY_KEY") as (chat, waits),
        pytest.raises(ValueError, match=r"rejects the request \(status 401.*bad key"),
    ):
        chat.answer("s", "p")
    assert waits == []
    assert stub.headers[0]["Authorization"] == "Bearer secret"


def test_a_server_that_is_not_there_is_a_clear_error(serving):
    with serving(lambda _request: saying("")) as (url, _):
        pass
    with endpoint(url, retries=2) as (chat, waits), pytest.raises(ValueError, match="could not be reached in 3 attempts"):
        chat.answer("s", "p")
    assert waits == [1.0, 2.0]
    with pytest.raises(ValueError, match="begins with http"):
        Endpoint("localhost:8000", "m")


def test_answers_are_kept_by_all_that_was_asked(tmp_path, serving):
    with serving(lambda request: saying(request["messages"][1]["content"])) as (url, stub):
        for _ in range(2):
            with endpoint(url, cache=tmp_path) as (chat, _):
                assert [chat.answer("s", text) for text in ("a", "b")] == ["a", "b"]
        assert (len(stub.requests), chat.usage.cached, chat.usage.requests) == (2, 2, 0)
        with endpoint(url, cache=tmp_path) as (chat, _):
            chat.answer("another system", "a")
    assert len(stub.requests) == 3


def test_requests_keep_their_distance(serving):
    with serving(lambda _request: saying("x")) as (url, _), endpoint(url, requests_per_minute=6) as (chat, waits):
        for _ in range(3):
            chat.answer("s", "p")
    assert len(waits) == 2
    assert waits[0] == pytest.approx(10, abs=1)
    # The clock has not moved, as the test does not sleep.
    assert waits[1] == pytest.approx(20, abs=1)


def test_what_the_explainer_sees(shown):
    prompt = explain_prompt(shown)
    assert "Excerpt 1: the <<dog>> runs0 far\nActivations: dog: 10" in prompt
    # 0.3 of 2 is below the mark.
    assert "<<runs" not in prompt


def test_wrong_marks_are_as_many_as_right_ones(shown):
    items = fuzzed(shown)
    assert [true for _, true in items] == [True] * 10 + [False] * 13
    assert all(text.count("<<") == 1 for text, _ in items)
    assert len({text.split().index(next(w for w in text.split() if "<<" in w)) for text, true in items if not true}) > 1


def test_labels_and_explanations_in_answers():
    assert labels_in("Here: [1, 0,1] done", 3) == [True, False, True]
    for answer in ("[1,0]", "[1,0,true]", "1,0,1", "[1,0,x]", "[[1,0,1]"):
        assert labels_in(answer, 3) is None or answer == "[[1,0,1]"
    assert explanation_in("EXPLANATION: a\nmore") == "a"
    assert explanation_in("thinking\nthe end\n") == "the end"
    assert explanation_in("EXPLANATION:  ") is None
    assert explanation_in("") is None


def test_a_local_model_answers_something(embedded_model):
    chat = LocalChat(embedded_model, max_tokens=5)
    assert isinstance(chat.answer("Then", "Aaron went " * 200), str)
    assert chat.usage == LlmUsage(requests=1, prompt_tokens=123, completion_tokens=5)


def test_an_endpoint_is_met_before_the_features_are_collected(serving, monkeypatch, tmp_path):
    """Nobody there, and a key that is refused, are known at once; one that has no list of models is believed."""
    with serving(lambda _request: saying("x")) as (url, stub), endpoint(url) as (chat, _):
        chat.require_ready()
        assert (stub.requests, chat.usage) == ([], LlmUsage())
    waits = []
    nobody = Endpoint(url, "m", retries=2, sleep=waits.append)
    with pytest.raises(ValueError, match=r"could not be reached in 3 attempts \(ConnectError"):
        nobody.require_ready()
    nobody.close()
    assert len(waits) == 2
    with pytest.raises(ValueError, match=r"--key-env: expected an environment variable that holds a key, got 'NO_SUCH_KEY'"):
        Endpoint(url, "m", "NO_SUCH_KEY")
    for status in (401, 403):
        transport = httpx.MockTransport(lambda _request, status=status: httpx.Response(status, text="bad key"))
        for key, said in (("OPENAI_API_KEY", "OPENAI_API_KEY, which is not set"), ("MY_KEY", "variable MY_KEY;")):
            monkeypatch.setenv("MY_KEY", "secret")
            monkeypatch.delenv("OPENAI_API_KEY", raising=False)
            refused = Endpoint("https://there", "m", key)
            refused._client = httpx.Client(transport=transport)
            with pytest.raises(ValueError, match=rf"rejects the API key \(status {status}: bad key\).*{said}"):
                refused.require_ready()
            refused.close()
    # What was answered before needs no server.
    (tmp_path / "answer.json").write_text("{}")
    kept = Endpoint(url, "m", cache=tmp_path, retries=0)
    kept.require_ready()
    kept.close()
