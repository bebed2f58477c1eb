"""Models with dictionaries in place: what the model then computes, its gradients, and that it comes back as it was."""

import pytest
import torch

from sparsary.sae import ENCODERS, SAE
from sparsary.training.activations.hooked_model import next_token_loss
from sparsary.training.activations.insertions import Insertion
from sparsary.training.activations.model import LanguageModel
from sparsary.training.activations.splice import model_spliced
from sparsary.transcoders.cross_layer import CrossLayerTranscoder
from sparsary.transcoders.transcoder import Transcoder

VOCABULARY = 53
SIZES = {
    "GPT2": {"n_layer": 3, "n_embd": 12, "n_head": 2},
    "GPTNeoX": {"num_hidden_layers": 3, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20},
    "Llama": {"num_hidden_layers": 3, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20},
}
BLOCKS = {"GPT2": "transformer.h.{}", "GPTNeoX": "gpt_neox.layers.{}", "Llama": "model.layers.{}"}
PROJECTIONS = {"GPT2": "attn.c_proj", "GPTNeoX": "attention.dense", "Llama": "self_attn.o_proj"}
KINDS = ("SAEs", "attention SAEs", "transcoder", "skip transcoders", "cross-layer")


def tiny(family, **more):
    import transformers

    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, **SIZES[family], **more)
    return LanguageModel(transformers.AutoModelForCausalLM.from_config(config), None, family, None)


@pytest.fixture
def gpt2():
    return tiny("GPT2")


def topk(k=3):
    return ENCODERS["topk"](k=k)


def scaled(dictionary):
    """In units of its own, with biases: nothing is 1 or 0 by chance."""
    with torch.no_grad():
        dictionary.in_scale.fill_(1.7)
        dictionary.out_scale.fill_(0.6)
        for parameter in dictionary.parameters():
            if parameter.ndim == 1:
                parameter.normal_(std=0.1)
        if getattr(dictionary, "W_skip", None) is not None:
            dictionary.W_skip.normal_(std=0.1)
    return dictionary.eval()


def mlp_hooks(block, layers, side):
    return tuple(f"{block.format(layer)}.mlp:{side}" for layer in layers)


def insertions_of(kind, family, d, n_layers):
    """Random dictionaries for a model of so many layers."""
    layers, block = range(n_layers), BLOCKS[family]
    reads, writes = mlp_hooks(block, layers, "in"), mlp_hooks(block, layers, "out")
    if kind == "SAEs":
        hooks = (*writes, f"{block.format(0)}:out")
        return [Insertion(scaled(SAE(d, 31, topk())), (hook,), (hook,)) for hook in hooks]
    if kind == "attention SAEs":
        hooks = [f"{block.format(layer)}.{PROJECTIONS[family]}:in" for layer in layers]
        return [Insertion(scaled(SAE(d, 31, topk())), (hook,), (hook,)) for hook in hooks]
    if kind == "transcoder":
        return [Insertion(scaled(Transcoder(d, d, 31, topk())), reads[1:2], writes[1:2])]
    if kind == "skip transcoders":
        pairs = zip(reads, writes, strict=True)
        return [Insertion(scaled(Transcoder(d, d, 31, topk(), skip=True)), (a,), (b,)) for a, b in pairs]
    clt = CrossLayerTranscoder(n_layers, n_layers * d, n_layers * d, n_layers * 31, topk())
    return [Insertion(scaled(clt), reads, writes)]


def check_error_restores_the_logits(model, insertions, ids):
    clean = model.logits(ids)
    kept = torch.rand(ids.shape) < 0.6
    for mask in (None, kept):
        with torch.no_grad(), model_spliced(model, insertions, add_error=True, kept=mask) as run:
            assert torch.equal(model.run(ids), clean)
        with model_spliced(model, insertions, kept=mask) as bare:
            assert not torch.allclose(model.logits(ids), clean, atol=1e-3)
        assert set(run.codes) == {(i, site) for i, one in enumerate(insertions) for site in range(len(one.dictionary.sites))}
        assert set(run.errors) == set(run.codes)
        assert not bare.errors
        tokens = ids.numel() if mask is None else int(mask.sum())
        assert {code.n_tokens for code in run.codes.values()} == {tokens}
        assert {error.shape[0] for error in run.errors.values()} == {tokens}
    assert torch.equal(model.logits(ids), clean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SIZES)
def test_with_the_error_added_the_logits_are_the_model_s_own(family, kind):
    model = tiny(family)
    check_error_restores_the_logits(model, insertions_of(kind, family, 12, 3), torch.randint(0, VOCABULARY, (2, 7)))


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_error_added_the_embedded_model_s_logits_are_its_own(embedded_model, kind):
    insertions = insertions_of(kind, "GPT2", 128, 4)
    check_error_restores_the_logits(embedded_model, insertions, torch.randint(3, 900, (2, 11)))


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_error_added_a_real_llama_s_logits_are_its_own(shared_data, kind):
    from sparsary.training.activations.model import load_model
    from sparsary.training.recipe import ModelSection

    model = load_model(ModelSection(id=str(shared_data / "models" / "stories3M"), device="cpu"))
    config = model.module.config
    insertions = insertions_of(kind, "Llama", config.hidden_size, config.num_hidden_layers)
    check_error_restores_the_logits(model, insertions, torch.randint(3, 900, (2, 11)))


def test_half_precision_stays_and_comes_back_whole(gpt2):
    gpt2.module.bfloat16()
    ids = torch.randint(0, VOCABULARY, (2, 7))
    for kind in KINDS:
        check_error_restores_the_logits(gpt2, insertions_of(kind, "GPT2", 12, 3), ids)


def test_a_dictionary_that_is_the_identity_costs_nothing(embedded_model):
    d, hooks = 128, ("transformer.h.1.mlp:out", "transformer.h.2:out", "transformer.h.2.attn.c_proj:in")
    sae = SAE(d, 2 * d, ENCODERS["relu"](sparsity=0.0)).eval()
    with torch.no_grad():
        for matrix in (sae.W_enc, sae.W_dec):
            matrix.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
    ids = torch.randint(3, 900, (2, 11))
    clean = next_token_loss(embedded_model.logits(ids), ids)
    with model_spliced(embedded_model, [Insertion(sae, (hook,), (hook,)) for hook in hooks]):
        torch.testing.assert_close(next_token_loss(embedded_model.logits(ids), ids), clean, rtol=1e-4, atol=1e-4)


def test_a_transcoder_made_of_a_relu_mlp_has_no_error():
    model = tiny("GPT2", activation_function="relu")
    insertions = []
    for layer, block in enumerate(model.module.transformer.h):
        dictionary = Transcoder(12, 12, 48, ENCODERS["relu"](sparsity=0.0)).eval()
        with torch.no_grad():
            for parameter in block.mlp.parameters():
                parameter.normal_(std=0.3)
            dictionary.W_enc.copy_(block.mlp.c_fc.weight.T)
            dictionary.b_enc.copy_(block.mlp.c_fc.bias)
            dictionary.W_dec.copy_(block.mlp.c_proj.weight)
            dictionary.b_dec.copy_(block.mlp.c_proj.bias)
        hooks = f"transformer.h.{layer}.mlp:in", f"transformer.h.{layer}.mlp:out"
        insertions.append(Insertion(dictionary, hooks[:1], hooks[1:]))
    ids = torch.randint(0, VOCABULARY, (3, 7))
    clean = model.logits(ids)
    with model_spliced(model, insertions, add_error=True) as run:
        model.logits(ids)
    for place, error in run.errors.items():
        scale = model.activations(ids, (insertions[place[0]].hooks_out[0],))[insertions[place[0]].hooks_out[0]].norm()
        assert error.norm() < 1e-5 * scale
    with model_spliced(model, insertions):
        torch.testing.assert_close(model.logits(ids), clean, rtol=1e-4, atol=1e-5)


def test_a_transcoder_replaces_what_the_mlp_returns(gpt2):
    (insertion,) = insertions_of("transcoder", "GPT2", 12, 3)
    ids = torch.randint(0, VOCABULARY, (2, 7))
    (hook_in,), (hook_out,) = insertion.hooks_in, insertion.hooks_out
    x = gpt2.activations(ids, (hook_in,))[hook_in]
    with torch.no_grad():
        y_hat = insertion.dictionary(x.flatten(0, 1)).view(2, 7, 12)
    with gpt2.replacing(hook_out, lambda _: y_hat):
        expected = gpt2.logits(ids)
    with model_spliced(gpt2, [insertion]):
        assert torch.equal(gpt2.logits(ids), expected)


@pytest.mark.parametrize(("arguments", "tokens"), [({}, 1), ({"add_error": True}, 14), ({"kept": torch.ones(2, 7) > 0}, 14)])
def test_an_mlp_whose_output_nobody_needs_is_not_computed(gpt2, arguments, tokens):
    seen = []
    mlp = gpt2.module.transformer.h[1].mlp
    mlp.c_fc.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2].numel()))
    with model_spliced(gpt2, insertions_of("transcoder", "GPT2", 12, 3), **arguments):
        gpt2.logits(torch.randint(0, VOCABULARY, (2, 7)))
    assert seen == [tokens]
    assert "forward" not in vars(mlp)


def test_an_mlp_inside_which_another_dictionary_stands_is_computed(gpt2):
    (transcoder,) = insertions_of("transcoder", "GPT2", 12, 3)
    within = ("transformer.h.1.mlp.c_proj:in",)
    sae = Insertion(scaled(SAE(48, 61, topk())), within, within)
    with model_spliced(gpt2, [transcoder, sae]) as run:
        gpt2.logits(torch.randint(0, VOCABULARY, (2, 7)))
    assert run.codes[1, 0].n_tokens == 14


def test_a_cross_layer_transcoder_without_cross_layer_decoders_is_a_stack(gpt2):
    (insertion,) = insertions_of("cross-layer", "GPT2", 12, 3)
    clt = insertion.dictionary
    clt.in_scale.mul_(torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(12))
    clt.out_scale.mul_(torch.tensor([3.0, 1.0, 2.0]).repeat_interleave(12))
    clt.in_centre.normal_(std=0.1)
    ids = torch.randint(0, VOCABULARY, (2, 7))
    with model_spliced(gpt2, [insertion]):
        crossed = gpt2.logits(ids)
    stack = []
    with torch.no_grad():
        for layer in range(3):
            clt.W_dec[layer][:, 12:] = 0
            block, here = clt.blocks[layer], slice(12 * layer, 12 * (layer + 1))
            single = scaled(Transcoder(12, 12, 31, topk()))
            single.in_scale.copy_(clt.in_scale[here][0])
            single.out_scale.copy_(clt.out_scale[here][0])
            single.W_enc.copy_(block.weights.W_enc)
            single.b_enc.copy_(block.weights.b_enc)
            single.W_dec.copy_(clt.W_dec[layer][:, :12])
            single.b_dec.copy_(clt.b_dec[here])
            single.in_centre.copy_(clt.in_centre[here])
            stack.append(Insertion(single, insertion.hooks_in[layer : layer + 1], insertion.hooks_out[layer : layer + 1]))
    with model_spliced(gpt2, [insertion]):
        diagonal = gpt2.logits(ids)
    with model_spliced(gpt2, stack):
        torch.testing.assert_close(gpt2.logits(ids), diagonal, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(crossed, diagonal, atol=1e-4)


def test_a_single_layer_of_a_cross_layer_transcoder_reads_the_earlier_ones_without_replacing_them(gpt2):
    (insertion,) = insertions_of("cross-layer", "GPT2", 12, 3)
    ids = torch.randint(0, VOCABULARY, (2, 7))
    with model_spliced(gpt2, [Insertion(insertion.dictionary, insertion.hooks_in, insertion.hooks_out, (1,))]) as run:
        found = gpt2.logits(ids)
    clt, seen = insertion.dictionary, gpt2.activations(ids, insertion.hooks_in)
    rows = [seen[hook].flatten(0, 1) for hook in insertion.hooks_in]
    with torch.no_grad():
        y_hat = clt.decode_at(1, [clt.encode_at(0, rows[0]), clt.encode_at(1, rows[1])], rows[1])
    with gpt2.replacing(insertion.hooks_out[1], lambda _: y_hat.view(2, 7, 12)):
        assert torch.equal(gpt2.logits(ids), found)
    assert set(run.codes) == {(0, 0), (0, 1)}


def loss_in_full(model, ids):
    """In the model's own precision: single precision has too few digits for small differences."""
    return -model.run(ids).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).sum()


@pytest.mark.parametrize("add_error", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_at_a_code_is_what_a_small_change_of_it_does(gpt2, kind, add_error):
    """Errors are constants, so they stay as they were while a value is changed; other dictionaries follow."""
    gpt2.module.double()
    insertions = insertions_of(kind, "GPT2", 12, 3)
    for insertion in insertions:
        insertion.dictionary.double().requires_grad_(False)
    ids = torch.randint(0, VOCABULARY, (2, 7))
    kept = torch.rand(2, 7) < 0.7
    with model_spliced(gpt2, insertions, add_error=add_error, kept=kept) as run:
        loss_in_full(gpt2, ids).backward()
    for place, code in run.codes.items():
        direction = torch.randn_like(code.values)
        losses = []
        for sign in (1, -1):
            moved = {place: type(code)(code.latents, code.values.detach() + sign * 1e-6 * direction, code.starts)}
            with torch.no_grad(), model_spliced(gpt2, insertions, kept=kept, codes=moved, errors=run.errors):
                losses.append(loss_in_full(gpt2, ids))
        found = (losses[0] - losses[1]) / 2e-6
        torch.testing.assert_close(found, (code.values.grad * direction).sum(), rtol=1e-4, atol=1e-7)
        if add_error:
            assert run.errors[place].grad.norm() > 0


def test_gradients_reach_earlier_dictionaries_through_later_ones(gpt2):
    insertions = insertions_of("skip transcoders", "GPT2", 12, 3)
    with model_spliced(gpt2, insertions):
        gpt2.run(torch.randint(0, VOCABULARY, (2, 7)))[:, -1].sum().backward()
    for insertion in insertions:
        for name, parameter in insertion.dictionary.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.norm() > 0, name


def test_positions_that_are_not_kept_have_the_model_s_own_tensor(gpt2):
    hook = "transformer.h.1:out"
    ids = torch.randint(0, VOCABULARY, (2, 7))
    own = gpt2.activations(ids, (hook,))[hook]
    sae = scaled(SAE(12, 31, topk()))
    kept = torch.rand(2, 7) < 0.5
    with model_spliced(gpt2, [Insertion(sae, (hook,), (hook,))], kept=kept):
        seen = gpt2.activations(ids, (hook,))[hook]
    assert torch.equal(seen[~kept], own[~kept])
    with torch.no_grad():
        assert torch.equal(seen[kept], sae(own[kept]))


def test_a_dictionary_reads_what_another_put_there(gpt2):
    (transcoder,) = insertions_of("transcoder", "GPT2", 12, 3)
    sae = Insertion(scaled(SAE(12, 37, topk())), transcoder.hooks_in, transcoder.hooks_in)
    ids = torch.randint(0, VOCABULARY, (2, 7))
    x = gpt2.activations(ids, transcoder.hooks_in)[transcoder.hooks_in[0]].flatten(0, 1)
    for insertions in ([transcoder, sae], [sae, transcoder]):
        with torch.no_grad(), model_spliced(gpt2, insertions) as run:
            gpt2.run(ids)
        place = insertions.index(transcoder), 0
        with torch.no_grad():
            expected = transcoder.dictionary.encode(sae.dictionary(x))
        torch.testing.assert_close(run.codes[place].to_dense(31), expected.to_dense(31))


def test_codes_and_errors_are_those_of_the_last_pass(gpt2):
    insertions = insertions_of("skip transcoders", "GPT2", 12, 3)
    with model_spliced(gpt2, insertions, add_error=True) as run:
        gpt2.logits(torch.randint(0, VOCABULARY, (2, 7)))
        gpt2.logits(torch.randint(0, VOCABULARY, (3, 5)))
        assert {code.n_tokens for code in run.codes.values()} == {15}
        # Stops at its hook.
        gpt2.activations(torch.randint(0, VOCABULARY, (1, 7)), ("transformer.h.1:in",))
        assert set(run.codes) == set(run.errors) == {(0, 0)}


def test_an_mlp_that_writes_into_its_input_does_not_disturb_a_skip(gpt2):
    ids = torch.randint(0, VOCABULARY, (2, 7))
    insertions = insertions_of("skip transcoders", "GPT2", 12, 3)
    with model_spliced(gpt2, insertions, add_error=True) as expected:
        gpt2.logits(ids)
    for block in gpt2.module.transformer.h:
        own = block.mlp.forward
        block.mlp.forward = lambda x, own=own: own(x.clone()) + 0 * x.zero_()
    with model_spliced(gpt2, insertions, add_error=True) as found:
        gpt2.logits(ids)
    for place, error in expected.errors.items():
        torch.testing.assert_close(found.errors[place], error)


def test_the_model_is_restored_after_an_exception(gpt2):
    ids = torch.randint(0, VOCABULARY, (2, 7))
    clean = gpt2.logits(ids)
    for kind in KINDS:
        insertions = insertions_of(kind, "GPT2", 12, 3)
        with pytest.raises(KeyboardInterrupt), model_spliced(gpt2, insertions):
            raise KeyboardInterrupt(gpt2.logits(ids))
        assert torch.equal(gpt2.logits(ids), clean)
    # In the middle of a pass, and on entering.
    wrong = Insertion(SAE(11, 31, topk()), ("transformer.h.1:out",), ("transformer.h.1:out",))
    good = insertions_of("skip transcoders", "GPT2", 12, 3)
    with pytest.raises(ValueError, match="expected"), model_spliced(gpt2, [*good, wrong]):
        gpt2.logits(ids)
    lost = Insertion(SAE(12, 31, topk()), ("transformer.h.9:out",), ("transformer.h.9:out",))
    with pytest.raises(ValueError, match="does not exist"), model_spliced(gpt2, [*good, lost]):
        pass
    assert torch.equal(gpt2.logits(ids), clean)
    for module in gpt2.module.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def sae_at(hook_in, hook_out=None, width=12):
    dictionary = SAE(width, 31, topk()) if hook_out is None else Transcoder(width, width, 31, topk())
    return Insertion(dictionary.eval(), (hook_in,), (hook_out or hook_in,))


@pytest.mark.parametrize(
    ("insertions", "arguments", "message"),
    [
        (
            [sae_at("transformer.h.1.mlp:out"), sae_at("transformer.h.1.mlp:in", "transformer.h.1.mlp:out")],
            {},
            r"transformer\.h\.1\.mlp:out: insertions 0 and 1 both replace it",
        ),
        ([sae_at("transformer.h.1.mlp:out", "transformer.h.1.mlp:in")], {}, "before the model reaches the hook that it reads"),
        ([sae_at("transformer.h.1.mlp:in", "transformer.h.1.mlp.c_fc:out")], {}, "expected width 12, .*, got 48"),
        ([sae_at("transformer.wte:in")], {}, r"\(contexts, positions, width\) of 2 contexts and 7 positions, got \(2, 7\)"),
        ([sae_at("transformer.h.1:out")], {"kept": torch.ones(2, 6) > 0}, r"kept: expected a mask .* = \(2, 7\)"),
        ([sae_at("transformer.h.1:out")], {"kept": torch.ones(2, 7)}, r"kept: expected a mask .* torch\.float32"),
    ],
)
def test_what_cannot_be_put_in_place_is_refused(gpt2, insertions, arguments, message):
    with pytest.raises(ValueError, match=message), model_spliced(gpt2, insertions, **arguments):
        gpt2.logits(torch.randint(0, VOCABULARY, (2, 7)))


def test_a_module_that_never_runs_is_named(gpt2):
    gpt2.module.idle = torch.nn.Linear(12, 12)
    with (
        pytest.raises(ValueError, match=r"idle:out: insertion 0 was not spliced in"),
        model_spliced(gpt2, [sae_at("idle:out")]),
    ):
        gpt2.logits(torch.randint(0, VOCABULARY, (2, 7)))


def test_a_dictionary_elsewhere_or_with_too_few_hooks_is_refused(gpt2):
    elsewhere = Insertion(SAE(12, 31, topk()).to("meta"), ("transformer.h.1:out",), ("transformer.h.1:out",))
    with pytest.raises(ValueError, match="insertion 0: expected a dictionary on cpu"), model_spliced(gpt2, [elsewhere]):
        pass
    (clt,) = insertions_of("cross-layer", "GPT2", 12, 3)
    with pytest.raises(ValueError, match="hooks_out: expected 3, one per site"):
        Insertion(clt.dictionary, clt.hooks_in, clt.hooks_out[:2])
    with pytest.raises(ValueError, match=r"written: expected sites 0 to 2, got \[3\]"):
        Insertion(clt.dictionary, clt.hooks_in, clt.hooks_out, (0, 3))


def test_a_code_of_other_tokens_is_refused(gpt2):
    insertion = sae_at("transformer.h.1:out")
    code = insertion.dictionary.encode(torch.randn(13, 12))
    with (
        pytest.raises(ValueError, match=r"codes: \(0, 0\): expected 14 tokens"),
        model_spliced(gpt2, [insertion], codes={(0, 0): code}),
    ):
        gpt2.logits(torch.randint(0, VOCABULARY, (2, 7)))
