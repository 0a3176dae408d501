"""LoRA: properties over shapes and dtypes, what is refused, and that a saved adapter is whole or not there."""

import copy
import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from rlhf_course.lora import LoRALinear, best_low_rank, inject_lora, linear_shapes, load_lora, lora_layers, low_rank_update, save_lora

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def model_of(kind=nn.Linear, width=8):
    """Two layers, the first of the given kind."""
    torch.manual_seed(0)
    first = nn.Linear(width, 6) if kind is nn.Linear else Conv1D(6, width)
    return nn.Sequential().append(first).append(nn.Linear(6, 3))


def random_adapter(base, r, alpha, use_rslora=False):
    """An adapted layer that changes something."""
    layer = LoRALinear(base, r, alpha, use_rslora)
    nn.init.normal_(layer.lora_B)
    return layer


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, alpha=st.floats(0.1, 50), use_rslora=st.booleans(), fused=st.booleans(), data=st.data())
def test_layer_is_the_matrix_it_stands_for(shape, alpha, use_rslora, fused, data):
    """Forward, merged and unmerged again, for every shape and rank, stored either way round."""
    d_out, d_in = shape
    r = data.draw(st.integers(1, min(shape)))
    torch.manual_seed(d_out * 100 + d_in)
    base = (Conv1D(d_out, d_in) if fused else nn.Linear(d_in, d_out)).double()
    weight, bias = (base.weight.T if fused else base.weight).detach().clone(), base.bias.detach().clone()
    layer = random_adapter(base, r, alpha, use_rslora)
    scale = alpha / (r**0.5 if use_rslora else r)
    expected_change = scale * torch.einsum("or,ri->oi", layer.lora_B, layer.lora_A).detach()
    assert_close(layer.change(), expected_change)
    assert torch.linalg.matrix_rank(layer.change(), atol=1e-9) <= r
    x = torch.randn(2, 3, d_in, dtype=torch.double)
    expected = linear(x, weight + expected_change, bias)
    assert_close(layer(x), expected)
    layer.merge()
    assert_close(layer(x), expected)
    layer.unmerge()
    assert_close(layer(x), expected)
    assert_close(base.weight.T if fused else base.weight, weight)
    if not use_rslora:
        assert_close(low_rank_update(layer.lora_A, layer.lora_B, alpha).detach(), expected_change)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_same_gradients_as_peft(use_rslora, kind):
    """Both factors, in float64, with B away from zero."""
    ours = inject_lora(model_of(kind).double(), ["0"], 3, 5.0, use_rslora=use_rslora)
    theirs = get_peft_model(model_of(kind).double(), LoraConfig(r=3, lora_alpha=5.0, use_rslora=use_rslora, target_modules=["0"],
                                                               fan_in_fan_out=kind is Conv1D))  # fmt: skip
    nn.init.normal_(ours[0].lora_B)
    twin = theirs.base_model.model[0]
    with torch.no_grad():
        for part, ours_part in {"lora_A": ours[0].lora_A, "lora_B": ours[0].lora_B}.items():
            getattr(twin, part)["default"].weight.copy_(ours_part)
    x = torch.randn(7, 8, dtype=torch.double)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for part in ("lora_A", "lora_B"):
        assert_close(getattr(ours[0], part).grad, getattr(twin, part)["default"].weight.grad)
    assert ours[0].base.weight.grad is None and ours[1].weight.grad is None


def test_weights_that_are_not_contiguous():
    """A transposed view as weight gives the right output, and merges."""
    base = nn.Linear(4, 6)
    base.weight = nn.Parameter(torch.randn(4, 6).T)
    assert not base.weight.is_contiguous()
    layer = random_adapter(base, 2, 4.0)
    x = torch.randn(3, 4)
    before = layer(x)
    layer.merge()
    assert_close(layer(x), before)


def test_same_seed_gives_the_same_adapters():
    """And another seed gives others."""

    def drawn(seed):
        torch.manual_seed(seed)
        return lora_layers(inject_lora(model_of(), ["0"], 2, 4.0))["0"].lora_A

    torch.manual_seed(0)
    model = model_of()
    first, again, other = (
        [torch.manual_seed(seed), inject_lora(copy.deepcopy(model), ["0"], 2, 4.0)][1][0].lora_A for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other) and drawn(0).shape == (2, 8)


@pytest.mark.parametrize("r", [0, -1, 7, 100])
def test_rank_out_of_range(r):
    """Named with the range."""
    with pytest.raises(ValueError, match=r"`r` should be from 1 to 6, .* got -?\d+"):
        inject_lora(model_of(), ["0"], r, 4.0)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan")])
def test_alpha_out_of_range(alpha):
    """Not above 0."""
    with pytest.raises(ValueError, match="`alpha` should be above 0"):
        inject_lora(model_of(), ["0"], 2, alpha)


def test_integer_weights_are_refused():
    """As a quantized layer has them."""
    base = nn.Linear(4, 4)
    base.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="floating-point"):
        LoRALinear(base, 2, 4.0)


def test_targets_that_match_nothing():
    """The error lists what there is; a part of a name is no match; a model is left as it was."""
    model = model_of()
    for target in ("q_proj", "", "00"):
        with pytest.raises(ValueError, match="of which there are 0, 1, got"):
            inject_lora(model, [target], 2, 4.0)
    with pytest.raises(ValueError, match="of which there are none"):
        linear_shapes(nn.Sequential(nn.ReLU()), ["0"])
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_no_second_adapter_and_no_second_merge():
    """Each is refused by name."""
    model = inject_lora(model_of(), ["0"], 2, 4.0)
    with pytest.raises(ValueError, match="one without adapters, got 1 adapted layers"):
        inject_lora(model, ["1"], 2, 4.0)
    model[0].merge()
    with pytest.raises(ValueError, match="already merged"):
        model[0].merge()
    model[0].unmerge()
    with pytest.raises(ValueError, match="already not merged"):
        model[0].unmerge()


def test_best_low_rank_is_no_worse_than_many_others():
    """Random factors refined by ten alternating least-squares steps never beat it."""
    torch.manual_seed(0)
    change = torch.randn(9, 7, dtype=torch.double)
    best = (change - torch.matmul(*best_low_rank(change, 3))).norm()
    for _ in range(20):
        A = torch.randn(3, 7, dtype=torch.double)
        for _ in range(10):
            B = torch.linalg.lstsq(A.T, change.T).solution.T
            A = torch.linalg.lstsq(B, change).solution
        assert (change - B @ A).norm() >= best - 1e-9


# Files.


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter of `model_of()`."""
    model = inject_lora(model_of(), ["0"], 2, 4.0, train_also=["1"])
    nn.init.normal_(model[0].lora_B)
    save_lora(model, tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_saved_and_loaded(saved):
    """The same outputs, and the same parameters are trained."""
    folder, model = saved
    loaded = load_lora(model_of(), folder)
    x = torch.randn(5, 8)
    assert_close(loaded(x), model(x))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_broken_adapters_are_refused(saved, tmp_path):
    """A missing folder, a file cut short, configurations that we do not serve, another model."""
    folder, _ = saved
    with pytest.raises(FileNotFoundError, match="no such file. Give a folder"):
        load_lora(model_of(), tmp_path / "nothing")
    config = json.loads((folder / "adapter_config.json").read_text())
    for change in ({"peft_type": "IA3"}, {"use_dora": True}, {"rank_pattern": {"0": 1}}, {"bias": "all"}):
        other = tmp_path / "other"
        shutil.copytree(folder, other, dirs_exist_ok=True)
        (other / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="not a plain LoRA adapter"):
            load_lora(model_of(), other)
    (other / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(ValueError, match="does not fit the model, first at 0.lora_A"):
        load_lora(model_of(), other)
    (other / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_lora(model_of(), other)
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(tensors[:-8])
    with pytest.raises(ValueError, match="cannot be read"):
        load_lora(model_of(), folder)
    with pytest.raises(ValueError, match="one with adapters, got none"):
        save_lora(model_of(), tmp_path / "empty")


def test_full_disk_leaves_the_old_adapter(saved):
    """A process that may not write larger files fails, and what was there stays whole."""
    folder, model = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    script = (
        "import resource, sys, torch; from torch import nn; from rlhf_course.lora import inject_lora, save_lora\n"
        "model = inject_lora(nn.Sequential(nn.Linear(512, 512)), ['0'], 64, 4.0)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY)); save_lora(model, {str(folder)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert_close(load_lora(model_of(), folder)(torch.ones(1, 8)), model(torch.ones(1, 8)))
