"""From a checkpoint to its three files, and what a user can get wrong."""

import json
import logging
import math
import sys

import pytest
import torch

import sparsary
from sparsary.eval.features.collect import Limits
from sparsary.eval.features.llm_client import Chat, LlmUsage
from sparsary.eval.features.records import SCHEMA_VERSION
from sparsary.eval.features.run import Explainer, features, features_summary
from sparsary.sae import ENCODERS, SAE
from sparsary.sae.files import read_json
from sparsary.training.recipe import HarvestSection, TextSection
from sparsary.transcoders.transcoder import Transcoder

HOOK = "transformer.h.2:out"
N = 67
TOKENS = 1500
LIMITS = Limits(top=4, sample=12, before=5, after=2, background=60)


def provenance(**changes):
    harvest = HarvestSection(hooks=(HOOK,), exclude_leading=2).model_dump(mode="json")
    return {
        "model": {"id": "embedded", "device": "cpu"},
        "hook": HOOK,
        "text": TextSection(context_length=32).model_dump(mode="json"),
        "harvest": {key: harvest[key] for key in ("dtype", "heldout", "exclude_special", "exclude_leading")},
    } | changes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "sae"
    torch.manual_seed(2)
    SAE(128, N, ENCODERS["topk"](k=5)).save(folder, provenance())
    return folder


@pytest.fixture(scope="module")
def about(checkpoint):
    return features(str(checkpoint), tokens=TOKENS, limits=LIMITS)


def lines(folder):
    def refuse(name):
        raise AssertionError(name)

    text = (folder / "features.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_one_line_a_latent_and_every_null_has_a_reason(checkpoint, about):
    records = lines(checkpoint / "features")
    assert [record["latent"] for record in records] == list(range(N))
    for record in records:
        assert record["schema_version"] == SCHEMA_VERSION
        assert set(record["scores"]) == {"predicate_f1", "example_embedding", "logit_lens"}
        nulls = {key for key, value in record.items() if value is None}
        nulls |= {f"scores.{key}" for key, value in record["scores"].items() if value is None}
        assert nulls == set(record["reasons"])
        assert record["density"] == pytest.approx(record["firings"] / record["tokens"], rel=1e-4)
        if record["dead"]:
            continue
        assert sum(record["histogram"]["counts"]) == record["firings"]
        assert len(record["histogram"]["edges"]) == len(record["histogram"]["counts"]) + 1
        peaks = [context["activations"][context["peak"]] for context in record["top"]]
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[0] == record["max_activation"]
        lows = [edge for part in record["quantiles"] for edge in (part["high"], part["low"])]
        assert lows == sorted(lows, reverse=True)
        effects = [entry["effect"] for entry in record["logits"]["promoted"]]
        assert effects == sorted(effects, reverse=True)
        assert record["logits"]["suppressed"][0]["effect"] < 0 < effects[0]
        assert sum(entry["share"] for entry in record["top_tokens"]) <= 1.001


def test_the_about_file_is_what_is_returned(checkpoint, about):
    saved = read_json(checkpoint / "features" / "features.json")
    assert saved == {key: value for key, value in about.items() if key != "page_path"}
    assert saved["tokens"] >= TOKENS
    assert saved["no_factors"] is None
    assert 0 < saved["predicate_f1_median"] < 1
    assert dict(features_summary(about))["read"].startswith(f"{saved['tokens']:,} held-out tokens")


def test_twice_gives_the_same_bytes(checkpoint, about, tmp_path):
    features(str(checkpoint), str(tmp_path), TOKENS, LIMITS)
    for name in ("features.jsonl", "features.json", "features.html"):
        assert (tmp_path / name).read_bytes() == (checkpoint / "features" / name).read_bytes()


def test_a_dead_dictionary_has_flagged_values(tmp_path):
    sae = SAE(128, N, ENCODERS["relu"]())
    sae.b_enc.data.fill_(-1e9)
    sae.save(tmp_path / "dead", provenance())
    about = features(str(tmp_path / "dead"), tokens=500, limits=LIMITS)
    assert (about["dead"], about["predicate_f1_median"]) == (N, None)
    assert "undefined" in dict(features_summary(about)).values()
    for record in lines(tmp_path / "dead" / "features"):
        assert record["dead"]
        assert record["top"] == record["quantiles"] == record["top_tokens"] == []
        assert record["reasons"]["scores.logit_lens"] == "the latent fired on no token of the pass"
        assert record["logits"] is not None


def test_a_transcoder_and_an_sae_off_the_stream(tmp_path):
    transcoder = Transcoder(128, 128, N, ENCODERS["topk"](k=5), skip=True)
    both = {"hook": None, "hooks_in": ["transformer.h.1.mlp:in"], "hooks_out": ["transformer.h.1.mlp:out"]}
    transcoder.save(tmp_path / "transcoder", provenance(**both))
    about = features(str(tmp_path / "transcoder"), tokens=500, limits=LIMITS)
    assert (about["hooks_in"], about["hooks_out"]) == (both["hooks_in"], both["hooks_out"])
    assert all(record["logits"] for record in lines(tmp_path / "transcoder" / "features"))
    SAE(128, N, ENCODERS["topk"](k=5)).save(tmp_path / "off", provenance(hook="transformer.h.1.ln_2:out"))
    features(str(tmp_path / "off"), tokens=500, limits=LIMITS)
    record = lines(tmp_path / "off" / "features")[0]
    assert record["logits"] is None
    assert "not the residual stream" in record["reasons"]["logits"]
    assert record["reasons"]["scores.logit_lens"] == record["reasons"]["logits"]


def test_a_dictionary_of_another_width_is_refused(tmp_path):
    SAE(96, N, ENCODERS["topk"](k=5)).save(tmp_path / "narrow", provenance())
    with pytest.raises(ValueError, match="expected width 96, the dictionary's d_in, got 128 from embedded"):
        features(str(tmp_path / "narrow"))


def test_text_without_a_heldout_token_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("one two")
    text = TextSection(source="files", files=(str(tmp_path / "text.txt"),), context_length=32).model_dump(mode="json")
    SAE(128, N, ENCODERS["topk"](k=5)).save(tmp_path / "sae", provenance(text=text))
    with pytest.raises(ValueError, match="expected held-out tokens, got none"):
        features(str(tmp_path / "sae"))


def test_less_text_than_asked_for_is_told(tmp_path):
    texts = [" ".join(f"the war lasted from the year 17{n:02d} to the year 18{n:02d}".split()) for n in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    text = TextSection(source="files", files=(str(tmp_path / "text.jsonl"),), context_length=32).model_dump(mode="json")
    harvest = provenance()["harvest"] | {"heldout": 0.9}
    SAE(128, N, ENCODERS["topk"](k=5)).save(tmp_path / "sae", provenance(text=text, harvest=harvest))
    found = features(str(tmp_path / "sae"), tokens=3000)
    assert found["tokens"] < 1500
    (line,) = found["shortfalls"]
    assert line.startswith(f"tokens: {found['tokens']:,} of 3,000 held-out tokens asked for")
    assert found["doubts"] == [line]
    assert "of 3,000 held-out tokens" in (tmp_path / "sae" / "features" / "features.html").read_text()


def test_tokens_that_are_not_finite_are_left_out_and_told(checkpoint, tmp_path, monkeypatch, about):
    from sparsary.training.activations.model import LanguageModel

    real, spoiled = LanguageModel.activations, []

    def overflowing(self, *arguments, **options):
        found = {hook: x.clone() for hook, x in real(self, *arguments, **options).items()}
        if not spoiled and found[HOOK].shape[1] > 20:
            found[HOOK][0, 20, 3] = torch.inf
            spoiled.append(found)
        return found

    monkeypatch.setattr(LanguageModel, "activations", overflowing)
    found = features(str(checkpoint), str(tmp_path), TOKENS, LIMITS)
    assert found["skipped"] == ["tokens whose activations are not finite: 1"]
    assert found["tokens"] == about["tokens"] - 1
    assert about["skipped"] == []


def test_tensors_have_no_text_to_show(tmp_path):
    SAE(128, N, ENCODERS["topk"](k=5)).save(tmp_path / "sae", provenance(model=None))
    with pytest.raises(ValueError, match="trained on tensors"):
        features(str(tmp_path / "sae"))
    with pytest.raises(ValueError, match="--tokens: expected at least 1, got -3"):
        features(str(tmp_path / "sae"), tokens=-3)


def test_numbers_are_finite(about):
    assert all(math.isfinite(value) for value in about.values() if isinstance(value, float))


def saying(text):
    return {"choices": [{"message": {"content": text}}]}


def test_the_command_line_explains_some_latents(checkpoint, tmp_path, monkeypatch, capsys, serving):
    def reply(request):
        if "EXPLANATION:" in request["messages"][0]["content"]:
            return saying("EXPLANATION: whatever")
        return saying(str([1, 0, 1, 0, 1][: request["messages"][1]["content"].count("Excerpt ")]))

    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["sparsary", "features", str(checkpoint), "--out", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as ended:
            sparsary.main()
        return ended.value.code, capsys.readouterr()

    with serving(reply) as (url, stub):
        code, said = command("--tokens", "1000", "--explainer", "stub-1", "--address", url, "--explain", "3")
        assert code == 0, said.err
    # Kept, so that the same command asks nothing again; of equal questions only one is asked.
    assert len(list((tmp_path / "answers").iterdir())) == len(stub.requests) > 0
    assert "explained" in said.out
    records = lines(tmp_path)
    explained = [record for record in records if record["explanation"]]
    assert 1 <= len(explained) <= 3
    assert explained[0]["explanation"]["text"] == "whatever"
    assert 0 <= explained[0]["explanation"]["detection"] <= 1
    assert all(record["reasons"]["explanation"] for record in records if not record["explanation"])
    code, said = command("--tokens", "3000", "--address", url)
    assert (code, "--explainer: expected the model's name at the endpoint with --address" in said.err) == (2, True)


def test_an_unreachable_explainer_is_met_before_the_text_is_read(checkpoint, tmp_path, monkeypatch, serving):
    monkeypatch.setattr("sparsary.eval.features.llm_client.FIRST_WAIT_SECONDS", 0.0)
    with serving(lambda _request: {}) as (url, _):
        pass
    with pytest.raises(ValueError, match="could not be reached"):
        features(str(checkpoint), str(tmp_path), 3000, LIMITS, explainer=Explainer("m", url))
    assert not list(tmp_path.iterdir())


def test_an_explainer_that_fails_later_leaves_what_was_written(checkpoint, tmp_path, monkeypatch, serving):
    monkeypatch.setattr("sparsary.eval.features.llm_client.FIRST_WAIT_SECONDS", 0.0)
    busy = serving(lambda _request: (503, {"error": "busy"}, {}))
    with busy as (url, stub), pytest.raises(ValueError, match="could not be reached"):
        features(str(checkpoint), str(tmp_path), 500, LIMITS, explainer=Explainer("m", url))
    assert stub.requests
    assert len(lines(tmp_path)) == N


class Agreeing(Chat):
    """Explains everything by the same words, and says yes; every text has the same loss."""

    name = "agreeing"

    def __init__(self):
        self.usage = LlmUsage()

    def answer(self, system, prompt):
        return "EXPLANATION: words" if "EXPLANATION:" in system else str([1] * prompt.count("Excerpt "))

    def loss(self, prompt, text):
        return 1.0

    def require_ready(self):
        pass

    def close(self):
        pass


def test_scorers_that_are_asked_for_are_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Explainer, "chat", lambda self, cache: Agreeing())
    monkeypatch.setattr("sparsary.eval.features.intervention.NEW_TOKENS", 3)
    limits = Limits(top=4, sample=20, before=11, after=4, background=80)
    asked = Explainer("m", latents=1, scorers=("intervention", "surprisal"))
    about = features(str(checkpoint), str(tmp_path), 4000, limits, explainer=asked)
    (explained,) = (record["explanation"] for record in lines(tmp_path) if record["explanation"])
    assert "detection" not in explained
    # Yes to everything is right half of the time, and losses that are equal tell nothing.
    assert (explained["intervention"], explained["surprisal"]) == (0.5, 0.5)
    assert explained["details"]["intervention"]["recall"] == 1
    assert (about["intervention_median"], about["surprisal_median"]) == (0.5, 0.5)
    assert "detection_median" not in about
    assert ("explained", "1 latents by agreeing   intervention 0.500   surprisal 0.500") in features_summary(about)
