"""Routers of mixtures: the site, and what replaced logits choose, by each architecture's own rule written out."""

import pytest
import torch

import sparsary
from sparsary.training.activations.hidden_states import HookError
from sparsary.training.activations.model import LanguageModel
from sparsary.training.activations.routers import chosen_experts, routing
from sparsary.training.activations.sites import find_block, hooks_with_sites, n_layers, site_hooks, sites_of
from sparsary.training.activations.weightless import weightless


def softmax_then_top(logits, off, router):
    scores = logits.masked_fill(off, -torch.inf).softmax(-1)
    values, indices = scores.topk(router.top_k, dim=-1)
    # Mixtral's has no such option.
    return (values / values.sum(-1, keepdim=True) if getattr(router, "norm_topk_prob", True) else values), indices


def top_then_softmax(logits, off, router):
    values, indices = logits.masked_fill(off, -torch.inf).topk(router.top_k, dim=-1)
    return values.softmax(-1), indices


def sigmoid_in_groups(logits, off, router):
    scores = logits.sigmoid().masked_fill(off, 0.0)
    ranked = (scores + router.e_score_correction_bias).masked_fill(off, -torch.inf)
    best = ranked.unflatten(-1, (router.num_group, -1)).topk(2, dim=-1).values.sum(-1).topk(router.topk_group, dim=-1).indices
    open_groups = torch.zeros(len(logits), router.num_group, dtype=torch.bool).scatter(1, best, True)
    ranked = ranked.masked_fill(~open_groups.repeat_interleave(logits.shape[1] // router.num_group, 1), -torch.inf)
    indices = ranked.topk(router.top_k, dim=-1).indices
    chosen = scores.gather(1, indices)
    return chosen / chosen.sum(-1, keepdim=True) * router.routed_scaling_factor, indices


def top_then_sigmoid(logits, off, router):
    values, indices = logits.masked_fill(off, -torch.inf).topk(router.top_k, dim=-1)
    return values.sigmoid(), indices


def top_of_probabilities(probabilities, off, router):
    values, indices = probabilities.masked_fill(off, -torch.inf).topk(router.config.top_k_experts, dim=-1)
    return values / values.sum(-1, keepdim=True) * router.per_expert_scale[indices], indices


RULES = {
    "mixtral": softmax_then_top,
    "qwen3_moe": softmax_then_top,
    "olmoe": softmax_then_top,
    "gpt_oss": top_then_softmax,
    "deepseek_v3": sigmoid_in_groups,
    "gemma4_text": top_of_probabilities,
    "llama4_text": top_then_sigmoid,
    "jetmoe": top_then_softmax,
}
SIZES = {
    "deepseek_v3": {"n_routed_experts": 8, "topk_group": 1},
    "qwen3_moe": {"decoder_sparse_step": 1},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "llama4_text": {"interleave_moe_layer_step": 1},
}
IDS = torch.randint(4, 90, (2, 7), generator=torch.Generator().manual_seed(1))
LAYER = 1


@pytest.fixture(scope="module")
def tiny(load_beside):
    return load_beside("tiny_models")


def mixture(tiny, kind):
    module = tiny.tiny_model(kind, num_hidden_layers=2, **SIZES.get(kind, {}))
    model = LanguageModel(module, None, kind, None)
    hook = site_hooks(module, LAYER, "router")[0]
    router = model.find(hook)[0]
    with torch.no_grad():
        # Logits far enough apart that a token's experts differ from another's.
        next(weight for name, weight in router.named_parameters() if name.endswith("weight")).mul_(20)
        if kind == "deepseek_v3":
            router.e_score_correction_bias.copy_(torch.linspace(1.5, -0.5, 8))
    return model, hook, router


def routed(model, hook, router, change):
    """Logits of the model, and weights of all experts, with the router's logits changed."""
    seen = []
    with model.hooked({hook: change}):
        handle = router.register_forward_hook(lambda _, _args, output: seen.append(routing(output, router)))
        logits = model.logits(IDS)
        handle.remove()
    (found,) = seen
    return logits, torch.zeros_like(found.logits).scatter(1, found.indices, found.scores)


@pytest.mark.parametrize("kind", RULES)
def test_replaced_logits_choose_by_the_model_s_own_rule(tiny, kind):
    model, hook, router = mixture(tiny, kind)
    plain = model.logits(IDS)
    untouched, before = routed(model, hook, router, lambda x: x.clone())
    assert torch.equal(untouched, plain)

    own = model.activations(IDS, (hook,))[hook]
    draw = torch.Generator().manual_seed(0)
    # One of every four experts is off: no group is left with fewer than two, nor a token with too few.
    off = torch.zeros(14, own.shape[-1] // 4, 4, dtype=torch.bool)
    off = off.scatter(2, torch.randint(4, off[..., :1].shape, generator=draw), True).flatten(1)
    logits, weights = routed(model, hook, router, lambda x: x.masked_fill(off.view_as(x), -torch.inf))
    scores, indices = RULES[kind](own.flatten(0, 1), off, router)
    torch.testing.assert_close(weights, torch.zeros_like(weights).scatter(1, indices, scores))
    assert (weights[off] == 0).all()
    assert (before[off] > 0).any()
    assert not torch.equal(logits, plain)
    # Without experts a block writes what it writes besides (DeepSeek's shared expert), or nothing.
    logits, weights = routed(model, hook, router, lambda x: torch.full_like(x, -torch.inf))
    assert (weights == 0).all()
    assert logits.isfinite().all()


@pytest.mark.parametrize("kind", RULES)
def test_the_site_is_found_without_weights_in_layers_that_have_a_mixture(tiny, kind):
    config = tiny.tiny_config(kind, num_hidden_layers=2, **SIZES.get(kind, {}))
    module = weightless(lambda: tiny.transformers.AutoModelForCausalLM.from_config(config))
    listed = {hook: layer for hook, (layer, sites) in hooks_with_sites(module).items() if "router" in sites}
    assert sorted(listed.values()) == ([1] if kind == "deepseek_v3" else [0, 1])
    widths = LanguageModel(module, None, kind, None).widths(tuple(listed))
    assert set(widths.values()) == {8 if kind == "deepseek_v3" else 4}
    assert "router" in sites_of(module)


def test_a_dictionary_of_router_logits_is_trained_and_spliced_in(tiny, tmp_path):
    model, hook, _ = mixture(tiny, "mixtral")
    (tmp_path / "a.txt").write_text("\n\n".join(tiny.words_of_text(60, 14)))
    recipe = {
        "text": {"source": "files", "files": [str(tmp_path / "a.txt")], "context_length": 16},
        "harvest": {"exclude_leading": 2, "heldout": 0.3, "live_buffer_tokens": 200},
        "dictionary": {"layer": LAYER, "site": "router", "n_latents": 12, "encoder": {"name": "topk", "k": 2}},
        "tokens": 400,
        "batch_tokens": 50,
        "out_dir": str(tmp_path / "run"),
        "eval_tokens": 100,
    }
    module, tokenizer = model.module, tiny.tiny_tokenizer()
    run = sparsary.train(recipe, model=module, tokenizer=tokenizer)
    trained = sparsary.load(run)
    assert (trained.hook, trained.d_in) == (hook, 4)
    report = sparsary.evaluate(run, model=module, tokenizer=tokenizer)
    # The reconstruction chooses experts: spliced in, the predictions are others.
    assert report["ce_spliced"] != report["ce_clean"]


def test_where_there_is_no_router_the_message_says_where_there_is_one(tiny):
    dense, some = tiny.tiny_model("gpt2"), mixture(tiny, "deepseek_v3")[0].module
    with pytest.raises(ValueError, match=r"site: expected one of .*no module of GPT2LMHeadModel returns a router's logits"):
        site_hooks(dense, 0, "router")
    with pytest.raises(ValueError, match=r"layers\.0 has no mixture of experts\. The layers that have one: 1\."):
        site_hooks(some, 0, "router")


def test_a_router_that_gives_logits_only_is_read_with_the_module_that_calls_it(tiny):
    """DBRX chooses experts in the block's mixture, which knows how many a token gets."""
    model, hook, router = mixture(tiny, "dbrx")
    mixed = next(part for part in model.module.modules() if getattr(part, "router", None) is router)
    mixed.top_k = 2
    plain, seen = model.logits(IDS), {}
    own = model.activations(IDS, (hook,))[hook]
    kept = own.flatten(0, 1).argsort(dim=-1)[:, :2]
    off = torch.ones(14, own.shape[-1], dtype=torch.bool).scatter(1, kept, False)
    for name, change in {"same": torch.clone, "off": lambda x: x.masked_fill(off.view_as(x), -torch.inf)}.items():
        calls = []
        handle = mixed.experts.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[1:]))
        with model.hooked({hook: change}), chosen_experts({"it": router}, model.module) as chosen:
            logits = model.logits(IDS)
        handle.remove()
        ((indices, scores),) = calls
        seen[name] = logits, torch.zeros_like(off, dtype=torch.float).scatter(1, indices, scores)
        assert torch.equal(chosen["it"], seen[name][1] > 0), name
    assert torch.equal(seen["same"][0], plain)
    assert (seen["off"][1] > 0).eq(~off).all()
    assert (seen["same"][1] > 0)[off].any()
    with model.hooked({hook: lambda x: x - torch.inf}), pytest.raises(HookError, match="Keep one expert on"):
        model.logits(IDS)


def test_a_mixture_without_a_logit_for_every_expert_is_told(tiny):
    with pytest.raises(
        ValueError, match=r"DogeForCausalLM has no logit for every expert: its router_gate gives logits of keys"
    ):
        site_hooks(tiny.tiny_model("doge", is_moe=True), 0, "router")


def test_a_router_whose_choice_is_not_by_its_logits_is_told(tiny):
    model, hook, router = mixture(tiny, "mixtral")
    own = router.forward

    def forward(x):
        logits, scores, indices = own(x)
        # No function returns what is said to be the logits.
        return torch.from_numpy(logits.numpy() + 1), scores, indices

    router.forward = forward
    assert model.activations(IDS, (hook,))[hook].shape == (2, 7, 4)
    with (
        model.hooked({hook: lambda x: x.clone()}),
        pytest.raises(HookError, match=r"expected a router that chooses experts by"),
    ):
        model.logits(IDS)


def test_gradients_reach_the_logits_of_chosen_experts(tiny):
    model, hook, router = mixture(tiny, "olmoe")
    leaves = []

    def leaf(x):
        leaves.append(x.detach().requires_grad_(True))
        return leaves[0].clone()

    with torch.enable_grad(), model.hooked({hook: leaf}), chosen_experts({"it": router}, model.module) as chosen:
        model.run(IDS).logsumexp(-1).sum().backward()
    assert chosen["it"].sum(-1).tolist() == [2] * 14
    grad = leaves[0].grad.flatten(0, 1)
    assert (grad[chosen["it"]] != 0).all()


def test_other_modules_are_no_routers():
    x, whole = torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.long)
    assert routing((x, x[:, :2], whole)) is not None
    for output in (x, (x,), (x, x), (x, whole[:2]), (x[None], whole), (x[:, :1], whole), (x, whole > 0), {"logits": x}):
        assert routing(output) is None


def test_the_routers_of_every_architecture_leave_out_what_is_off(tiny):
    """Wherever a site is found, an expert whose logit is minus infinity gets no token, and the same logits change nothing."""
    found = []
    for kind in tiny.KINDS:
        if "expert" not in " ".join(tiny.tiny_config(kind).to_dict()) and kind != "dbrx":
            continue
        module = tiny.tiny_model(kind)
        model = LanguageModel(module, None, kind, None)
        blocks = [find_block(module, layer).router for layer in range(n_layers(module))]
        path = next((path for path in blocks if path is not None), None)
        if path is None:
            continue
        hook, router = f"{path}:out", module.get_submodule(path)
        plain = model.logits(IDS)
        untouched, before = routed(model, hook, router, lambda x: x.clone())
        assert torch.equal(untouched, plain), kind
        expert = int(before.sum(0).argmax())
        _, weights = routed(model, hook, router, lambda x, expert=expert: x.index_fill(-1, torch.tensor([expert]), -torch.inf))
        assert (weights[:, expert] == 0).all(), kind
        found.append(kind)
    # Tiny Gemma 4 has no mixture.
    assert {*RULES, "dbrx"} - {"gemma4_text"} <= set(found)
    assert len(found) > 40
