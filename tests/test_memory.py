"""The memory of a training step: the formula on other shapes, the counter on other graphs, and bad input."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_course.memory import MemoryBudgetError, ModelShape, count_saved_bytes, layer_activations, step_memory


def llama(hidden=32, layers=1, heads=4, kv=2, inner=48, vocab=50, tied=True, fused=True):
    """A small model of random weights and its shape."""
    config = LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, intermediate_size=inner,
                         vocab_size=vocab, tie_word_embeddings=tied, attn_implementation="sdpa" if fused else "eager")  # fmt: skip
    return LlamaForCausalLM(config).train(), ModelShape.from_config(config)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(2, 40), st.booleans(), st.booleans(), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.booleans(),
       st.sampled_from([torch.float32, torch.bfloat16]))
def test_formula_within_five_percent_everywhere(batch_size, length, fused, padded, kv, layers, tied, dtype):
    """Shapes, kernels, pads and types that no grid of the lesson holds."""
    model, shape = llama(layers=layers, kv=kv, tied=tied, fused=fused)
    model.to(dtype)
    input_ids = torch.randint(50, (batch_size, length))
    mask = torch.ones_like(input_ids)
    mask[0, length - (length // 2 if padded else 0) :] = 0
    with count_saved_bytes(model) as saved:
        model(input_ids=input_ids, attention_mask=mask, labels=input_ids, use_cache=False).loss.backward()
    predicted = step_memory(shape, batch_size, length, fused=fused, padded=padded, activation_bytes=dtype.itemsize)
    assert saved.live == 0 and predicted.activations >= saved.peak - 4 * len(list(model.parameters()))
    assert kv == 1 or predicted.activations / saved.peak < 1.05  # repeating one head copies nothing
    assert shape.n_parameters == sum(p.numel() for p in model.parameters())


def test_counter_follows_several_steps_and_what_is_kept():
    """Two backward passes, a graph that is kept, a graph that is dropped, and views of one storage."""
    x = torch.randn(100, requires_grad=True)
    with count_saved_bytes() as saved:
        for _ in range(3):
            x.exp().sum().backward()
            assert saved.live == 0
        y = x.exp()
        y.sum().backward(retain_graph=True)
        assert saved.live == 400
        del y
        gc.collect()
        assert saved.live == 0 and saved.peak == 400
        z = x.exp()
        w = z[:50].sin() + z[50:].sin()  # views of z, which exp saves too
        assert saved.live == 400
        del z, w
        gc.collect()
        assert saved.live == 0


def test_counter_leaves_out_weights_but_not_other_tensors():
    """A linear layer saves its input and its weight."""
    layer, x = nn.Linear(30, 20), torch.randn(7, 30, requires_grad=True)
    with count_saved_bytes(layer) as saved:
        layer(x)
    with count_saved_bytes() as everything:
        layer(x)
    assert saved.peak == 7 * 30 * 4 and everything.peak == 7 * 30 * 4 + 30 * 20 * 4


def test_nothing_is_counted_without_gradients():
    """Nothing is saved, so nothing is counted."""
    model, _ = llama()
    with count_saved_bytes(model, budget=1) as saved, torch.no_grad():
        model(input_ids=torch.zeros(2, 5, dtype=torch.long))
    assert saved.peak == 0


def test_budget_raises_in_forward_and_leaves_the_model_usable():
    """The error comes from the operation that goes over, and a step after it is as if nothing had been."""
    model, shape = llama()
    input_ids = torch.randint(50, (3, 20))
    need = step_memory(shape, 3, 20).activations
    with pytest.raises(MemoryBudgetError, match="the budget is"), count_saved_bytes(model, budget=need // 2):
        model(input_ids=input_ids, labels=input_ids, use_cache=False)
    assert all(p.grad is None for p in model.parameters()) and issubclass(MemoryBudgetError, MemoryError)
    with count_saved_bytes(model, budget=int(1.05 * need)) as saved:
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    assert saved.live == 0


def test_terms_scale_as_they_say():
    """Batch doubles all activations; length doubles one part and quadruples the other; frozen weights need neither gradient nor state."""
    shape = ModelShape(32, 2, 4, 2, 48, 50)
    linear, square = layer_activations(shape, 2, 10, fused=False)
    assert layer_activations(shape, 4, 10, fused=False) == (2 * linear, 2 * square)
    assert layer_activations(shape, 2, 20, fused=False) == (2 * linear, 4 * square)
    frozen = step_memory(shape, 1, 8, n_trained=0)
    assert frozen.gradients == frozen.optimizer == 0 < frozen.weights
    assert step_memory(shape, 1, 8, weight_bytes=0.5).weights == round(shape.n_parameters / 2)
    whole = step_memory(shape, 1, 8)
    assert whole.total == whole.weights + whole.gradients + whole.optimizer + whole.layers + whole.attention + whole.output


def test_refusals_name_the_argument():
    """Sizes below one, heads that do not divide, a budget that is none."""
    shape = ModelShape(32, 2, 4, 2, 48, 50)
    for name in ("batch_size", "length", "activation_bytes"):
        with pytest.raises(ValueError, match=f"^step_memory: `{name}` should be at least 1, got 0;"):
            step_memory(shape, **{"batch_size": 1, "length": 1, name: 0})
    with pytest.raises(ValueError, match="^ModelShape: `n_layers` should be at least 1"):
        ModelShape(32, 0, 4, 2, 48, 50)
    for heads, kv in ((5, 1), (4, 3)):
        with pytest.raises(ValueError, match="^ModelShape: `n_heads` should be a divisor"):
            ModelShape(32, 1, heads, kv, 48, 50)
    for budget in (0, -1):
        with pytest.raises(ValueError, match="^count_saved_bytes: `budget` should be at least 1"), count_saved_bytes(budget=budget):
            pass
