"""Relevance at the layers of a model of tokens, and at the weights and heads of its attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import lrpfunc as lrp
from tests.cases import normal, randomized

IDS = torch.tensor([[5, 17, 42, 8, 3], [1, 2, 0, 4, 0]])
SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def gpt2(attention: str) -> tuple[nn.Module, Any]:
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=4)
    config._attn_implementation = attention
    return transformers.GPT2LMHeadModel(config), lambda out: out.logits[:, -1]


def bert(attention: str) -> tuple[nn.Module, Any]:
    config = transformers.BertConfig(intermediate_size=32, **SMALL)
    config._attn_implementation = attention
    return transformers.BertForSequenceClassification(config), lambda out: out.logits


def llama(attention: str) -> tuple[nn.Module, Any]:
    config = transformers.LlamaConfig(intermediate_size=32, num_key_value_heads=2, **SMALL)
    config._attn_implementation = attention
    return transformers.LlamaForCausalLM(config), lambda out: out.logits[:, -1]


NETS: dict[str, Any] = {"gpt2": gpt2, "bert": bert, "llama": llama}
COMPOSITES = {"attn_lrp": lrp.attn_lrp(), "cp_lrp": lrp.cp_lrp(), "gradient": lrp.gradient()}


def made(name: str, attention: str = "sdpa") -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    net, output = NETS[name](attention)
    # A larger spread than that of a new model, so that the heads have something to say.
    for parameter in net.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    model_fn, params = lrp.from_module(net.double().eval(), output=output)
    return model_fn, {key: value.detach() for key, value in params.items()}


ONE_FOR_EVERY_DAY = ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in NETS if name != "bert")]


@pytest.mark.parametrize("name", ONE_FOR_EVERY_DAY)
def test_every_module_is_answered(name: str) -> None:
    model_fn, params = made(name)
    relevance, layers = lrp.attribute(model_fn, lrp.attn_lrp(), layers="*")(params, IDS, target=1)
    assert relevance is None
    embedding = {"gpt2": "transformer.wte", "bert": "bert.embeddings.word_embeddings", "llama": "model.embed_tokens"}
    head = {"gpt2": "lm_head", "bert": "classifier", "llama": "lm_head"}
    blocks = {"gpt2": "transformer.h.", "bert": "bert.encoder.layer.", "llama": "model.layers."}
    assert {embedding[name], head[name], f"{blocks[name]}0", f"{blocks[name]}1"} <= layers.keys()
    assert not any(name.endswith((".weights", ".heads")) for name in layers)
    # It is the same wherever else it is asked for, and by name.
    fn = lrp.attribute(model_fn, lrp.attn_lrp(), layers=embedding[name])
    assert torch.allclose(fn(params, IDS, target=1)[1][embedding[name]], layers[embedding[name]])
    some = lrp.attribute(model_fn, lrp.attn_lrp(), layers=f"{blocks[name]}1")(params, input_ids=IDS, target=1)[1]
    torch.testing.assert_close(some[f"{blocks[name]}1"], layers[f"{blocks[name]}1"])
    # And what comes to the embeddings is what would come to them as an input.
    weight = params[f"{embedding[name]}.weight"]
    by_embeddings = lrp.attribute(model_fn, lrp.attn_lrp(), argnames="inputs_embeds")
    expected = by_embeddings(params, inputs_embeds=weight[IDS], target=1)
    assert torch.allclose(layers[embedding[name]], expected)


@pytest.mark.parametrize("name", ONE_FOR_EVERY_DAY)
def test_weights_and_heads_are_the_same_fused_and_written_out(name: str) -> None:
    nets = {attention: made(name, attention) for attention in ("eager", "sdpa")}
    path = {"gpt2": "transformer.h.0.attn", "bert": "bert.encoder.layer.0.attention.self"}
    base = path.get(name, "model.layers.0.self_attn")
    for label, rules in COMPOSITES.items():
        written, fused = (
            lrp.attribute(model_fn, rules, layers=["*.weights", "*.heads"])(params, IDS, target=1)[1]
            for model_fn, params in nets.values()
        )
        assert written.keys() == fused.keys()
        assert {f"{base}.weights", f"{base}.heads"} <= written.keys()
        assert len(written) == 4
        scale = max(float(value.abs().max()) for value in written.values())
        for key, value in written.items():
            assert value.shape == ((2, 4, 5, 5) if key.endswith("weights") else (2, 4, 5, 4))
            # Llama's softmax is of single precision where it is written out.
            torch.testing.assert_close(value, fused[key], atol=scale * (1e-6 if name == "llama" else 1e-10), rtol=0)
            assert value.abs().max() > 0 or (label == "cp_lrp" and key.endswith("weights"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_the_sums_mean(attention: str) -> None:
    """AttnLRP gives the weights half of what the heads have; CP-LRP nothing; the heads have what the module gets."""
    model_fn, params = made("gpt2", attention)
    asked = ["*.h.1.attn.weights", "*.h.1.attn.heads", "*.h.1.attn.c_proj"]
    for rules, share in ((lrp.attn_lrp(), 0.5), (lrp.cp_lrp(), 0.0)):
        _, layers = lrp.attribute(model_fn, rules, layers=asked)(params, IDS, target=1)
        weights, heads = layers["transformer.h.1.attn.weights"], layers["transformer.h.1.attn.heads"]
        torch.testing.assert_close(weights.sum(-1), share * heads.sum(-1))  # query by query
        table = lrp.explain(model_fn, rules, layers=asked)(params, IDS, target=1)
        (row,) = (row for row in table.rows if row.layer.outputs[0] is _heads_of(table, 1))
        assert heads.sum() == pytest.approx(row.relevance_out)


def _heads_of(table: lrp.Explanation, index: int) -> Any:
    """The node of the heads of that attention: the last product, or fused attention, of each module."""
    kinds = (lrp.Kind.ATTENTION, lrp.Kind.PRODUCT)
    rows = [row for row in table.rows if row.layer.kind in kinds and row.layer.name == f"transformer.h.{index}.attn"]
    return rows[0].layer.outputs[0]  # from the output to the input


class Causal(nn.Module):
    """Attention of 4 heads over 2 keys and values, with a mask, dropout and a second attention in one module."""

    def __init__(self, fused: bool):
        super().__init__()
        self.fused, self.embed = fused, nn.Embedding(50, 16)
        self.q, self.k, self.v, self.out = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (q @ k.mT * 0.3).masked_fill(~mask, -torch.inf)
        return F.dropout(scores.softmax(-1), 0.1, self.training) @ v

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = self.attend(q, k, v)
        y = y + self.attend(y, k, v)
        return self.out(y.transpose(1, 2).flatten(2))[:, -1]


def test_several_attentions_in_a_module_and_derivatives() -> None:
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        model_fn, params = lrp.from_module(nn.Sequential(randomized(Causal(fused))))
        fn = lrp.attribute(model_fn, lrp.attn_lrp(), layers=["0.weights*", "0.heads*"])
        _, layers = fn(params, IDS, target=1)
        assert [*layers] == ["0.weights", "0.heads", "0.weights@1", "0.heads@1"]
        assert all(
            torch.equal(value, op) for value, op in zip(layers.values(), _op_by_op(model_fn, params), strict=True)
        )

        def loss(params: Any, fn: Any = fn) -> Tensor:
            return fn(params, IDS, target=1)[1]["0.weights"].square().sum()

        gradient = torch.func.grad(loss)({key: value.detach() for key, value in params.items()})
        each = torch.vmap(lambda t, fn=fn, params=params: fn(params, IDS, target=t)[1])(torch.arange(3))
        assert torch.allclose(each["0.weights@1"][1], layers["0.weights@1"])
        found.append((layers, gradient))
    (fused, slope), (written, expected) = found
    torch.testing.assert_close(fused, written)
    torch.testing.assert_close(slope, expected)


def _op_by_op(model_fn: Any, params: Any) -> list[Tensor]:
    fn = lrp.attribute(model_fn, lrp.attn_lrp(), layers=["0.weights*", "0.heads*"], lowered=False)
    return list(fn(params, IDS, target=1)[1].values())


def test_attention_of_torchs_own_module() -> None:
    model_fn, params = lrp.from_module(randomized(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)).eval())
    x = normal(1, 5, 8)
    _, layers = lrp.attribute(model_fn, lrp.attn_lrp(), layers=["*weights", "*heads"])(params, x)
    shapes = {key: tuple(value.shape) for key, value in layers.items()}
    assert shapes == {"self_attn.weights": (1, 2, 5, 5), "self_attn.heads": (1, 2, 5, 4)}
    with pytest.raises(lrp.LayerNotFoundError, match=r"The names are .*self_attn.weights, self_attn.heads"):
        lrp.attribute(model_fn, lrp.attn_lrp(), layers="self_attn.*")(params, x)


def test_attention_of_a_function() -> None:
    def fused(params: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x @ w for w in params))

    def written(params: Any, x: Tensor) -> Tensor:
        q, k, v = (x @ w for w in params)
        return (q @ k.mT / 2).softmax(-1) @ v

    params, x = [normal(3, 4, seed=i) for i in range(3)], normal(2, 2, 5, 3)
    _, one = lrp.attribute(fused, lrp.attn_lrp(), layers="*weights")(params, x)
    _, other = lrp.attribute(written, lrp.attn_lrp(), layers="*weights")(params, x)
    assert [*one] == ["scaled_dot_product_attention.weights"]
    (weights,), (expected,) = one.values(), other.values()
    torch.testing.assert_close(weights, expected)
    _, one = lrp.attribute(lambda _, x: F.scaled_dot_product_attention(x, x, x), layers="*weights")(None, x)
    _, other = lrp.attribute(lambda _, x: (x @ x.mT / 3**0.5).softmax(-1) @ x, layers="*weights")(None, x)
    (weights,), (expected,) = one.values(), other.values()
    torch.testing.assert_close(weights, expected)
    constant = lrp.attribute(lambda w, x: F.scaled_dot_product_attention(w, w, x), layers="*heads")
    with pytest.raises(lrp.LayerNotFoundError, match=r"layers='\*heads' matches no layer"):
        constant(x, x)


def test_masks_that_are_made_of_tokens_carry_nothing() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            keep = (ids != 0).double()[..., None]
            positions = (ids != 0).long().cumsum(-1)
            x = self.embed(ids) + self.embed(positions)
            return self.head((x * keep).sum(1) / keep.sum(1))

    model_fn, params = lrp.from_module(randomized(Padded()))
    _, layers = lrp.attribute(model_fn, lrp.epsilon(), layers="*")(params, IDS, target=1)
    assert layers.keys() == {"embed", "head"}  # the second call is of positions
    assert layers["embed"][1, 4].abs().max() == 0 < layers["embed"][1, 3].abs().max()


def test_tokens_as_one_hot_vectors_and_as_numbers() -> None:
    def model_fn(params: Tensor, ids: Tensor) -> Tensor:
        return (F.one_hot(ids, 50).double() @ params).sum(1)

    _, layers = lrp.attribute(model_fn, lrp.epsilon(0.0), layers="*")(normal(50, 3), IDS, target=1)
    assert layers["matmul"].shape == (2, 5, 3)
    images = torch.arange(8).reshape(2, 4)
    _, layers = lrp.attribute(lambda w, x: x.double() @ w, lrp.epsilon(0.0), layers="*")(normal(4, 3), images, target=1)
    assert layers["matmul"].shape == (2, 3)


def test_tokens_that_choose_among_log_probabilities() -> None:
    model_fn, params = lrp.from_module(randomized(nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 50))))

    def log_probability(params: Any, ids: Tensor) -> Tensor:
        return model_fn(params, ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))

    _, layers = lrp.attribute(log_probability, layers="0")(params, IDS)
    assert layers["0"][:, -1].abs().max() == 0 < layers["0"][:, -2].abs().max()


def test_keyword_arguments_of_a_tokenizer() -> None:
    model_fn, params = made("bert")
    encoding = {"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS), "attention_mask": (IDS != 0).long()}
    fn = lrp.attribute(model_fn, lrp.attn_lrp(), layers="bert.embeddings.word_embeddings")
    relevance, layers = fn(params, **encoding, target=1)
    assert relevance is None
    expected = fn(params, IDS, encoding["attention_mask"], encoding["token_type_ids"], target=1)[1]
    torch.testing.assert_close(layers, expected)
    _, by_name = lrp.attribute(model_fn, lrp.attn_lrp(), argnames="input_ids", layers="*word_embeddings")(
        params, **encoding, target=1
    )
    torch.testing.assert_close(by_name, expected)
    with pytest.raises(
        lrp.InputError, match=r"argument 'input_ids': it is a tensor of torch.int64.*layers='\*embed\*'"
    ):
        lrp.attribute(model_fn, lrp.attn_lrp())(params, **encoding, target=1)


def test_names_that_no_layer_has() -> None:
    model_fn, params = made("gpt2")
    with pytest.raises(lrp.LayerNotFoundError, match=r"layers='wte' matches no layer .* The names are transformer.wte"):
        lrp.attribute(model_fn, lrp.attn_lrp(), layers="wte")(params, IDS, target=1)
