"""training/fused.py against the plain formula of lora_layers.py, module by module."""

import copy

import pytest
import safetensors.torch
import torch
from conftest import assert_same_tensors, base_weights, cosine, gradients_of, output, randomise, with_lora

from lora_layers import (
    PROJECTIONS,
    LoRAAttnProcessor,
    LoRALinearLayer,
    lora_modules,
    lora_parameters,
    merge_lora,
    save_lora_weights,
    unmerge_lora,
)
from training import fused as fused_module
from training.fused import fuse_lora


@pytest.mark.parametrize(
    "dtype, least",
    [(torch.float64, 1 - 1e-14), (torch.float32, 0.999999), (torch.float16, 0.999), (torch.bfloat16, 0.99)],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_projections_give_the_gradients_of_the_plain_ones_in_every_module(
    pristine_unet, batch, dtype, least, checkpointing
):
    """Cosine to the plain float32 path (to the plain float64 path in float64), module by module."""
    precise = torch.promote_types(dtype, torch.float32)
    unet = with_lora(pristine_unet, size=0.05)
    unet.train()
    expected = gradients_of(unet.to(precise), batch)
    names = list(lora_modules(unet))
    for weight, values in zip(lora_parameters(with_lora(pristine_unet, size=0.05)), lora_parameters(unet), strict=True):
        assert torch.equal(weight.to(precise), values)
    fused = with_lora(pristine_unet, size=0.05)
    fused.to(dtype)
    if dtype != torch.float64:
        for processor in fused.attn_processors.values():  # the LoRA stays in float32
            processor.float()
        for weight, values in zip(lora_parameters(fused), lora_parameters(unet), strict=True):
            weight.data.copy_(values)
    fuse_lora(fused)
    if checkpointing:
        fused.enable_gradient_checkpointing()
    fused.train()
    gradients = gradients_of(fused, batch)
    assert {gradient.dtype for gradient in gradients} == {precise}
    for number, (a, b) in enumerate(zip(expected, gradients, strict=True)):
        assert cosine(a, b) >= least, (names[number // 2], cosine(a, b))
        assert b.norm() == pytest.approx(a.norm().item(), rel=0.2 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("dtype, least", [(torch.float16, 0.99999), (torch.bfloat16, 0.9999)])
def test_every_fused_projection_in_half_precision_has_float32s_gradients(pristine_unet, dtype, least):
    """Cosines of dx, dA and dB for one input and dy, so that no rounding but the projection's own is seen."""
    plain, fused = with_lora(pristine_unet), with_lora(copy.deepcopy(pristine_unet).to(dtype))
    fuse_lora(fused)
    fused_module._refresh(fused, None)  # as the UNet's call does
    generator = torch.Generator().manual_seed(3)
    for name in plain.attn_processors:
        pair = [unet.get_submodule(name.removesuffix(".processor")) for unet in (plain, fused)]
        for names in pair[1].processor.project.products:
            linears = [pair[0].get_submodule(PROJECTIONS[one]) for one in names]
            x = torch.randn(2, 64, linears[0].in_features, generator=generator)
            gradients = [torch.randn(2, 64, linear.out_features, generator=generator) for linear in linears]
            found = []
            for attn in pair:
                given = x.clone().to(attn.to_q.weight.dtype).requires_grad_()
                outputs = attn.processor.project(attn, names, given)
                torch.autograd.backward(outputs, [gradient.to(given.dtype) for gradient in gradients])
                loras = [attn.processor.lora[one] for one in names]
                found.append([given.grad, *(w.grad for lora in loras for w in (lora.down_weight, lora.up_weight))])
            assert min(map(cosine, *found)) >= least, (name, names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_projections_are_no_farther_from_float32_than_the_plain_ones(pristine_unet, batch, dtype):
    """Over a whole UNet bf16's 8 bits add up: the worst module's cosine is 0.991 with the plain formula, too."""
    expected = gradients_of(with_lora(pristine_unet, size=0.05), batch)
    distances = []
    for fuse in (lambda unet: None, fuse_lora):
        unet = with_lora(copy.deepcopy(pristine_unet).to(dtype), size=0.05)
        fuse(unet)
        cosines = list(map(cosine, expected, gradients_of(unet, batch)))
        distances.append(1 - sum(cosines) / len(cosines))
    plain, fused = distances
    assert fused <= 1.2 * plain, (fused, plain)


def test_fused_projections_take_far_fewer_operations(pristine_unet, batch):
    from torch.profiler import profile

    counts = []
    for fused in (False, True):
        unet = with_lora(pristine_unet)
        if fused:
            fuse_lora(unet)
        with profile() as profiled:
            gradients_of(unet, batch)
        products = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
        counts.append(sum(event.count for event in profiled.key_averages() if event.key in products))
    assert counts[1] < 0.7 * counts[0], counts


def test_fused_weights_are_those_of_the_moment_also_in_a_copy(pristine_unet, batch):
    unet = with_lora(pristine_unet)
    fuse_lora(unet)
    twin = copy.deepcopy(unet)
    for model, seed in ((unet, 7), (twin, 8)):
        randomise(model, seed)
        torch.testing.assert_close(output(model, batch), output(with_lora(pristine_unet, seed=seed), batch))
    assert (output(unet, batch) - output(twin, batch)).abs().max() > 0.01


def test_fused_unet_falls_back_where_its_operands_do_not_fit(pristine_unet, batch):
    """After unet.to(...), under autocast, or if a self-attention is given a text."""
    latents, timesteps, text = batch
    for change in (lambda unet: unet.double(), lambda unet: unet):
        plain, fused = with_lora(pristine_unet), with_lora(pristine_unet)
        fuse_lora(fused)
        change(plain), change(fused)
        given = (latents.to(plain.dtype), timesteps, text.to(plain.dtype))
        torch.testing.assert_close(output(fused, given), output(plain, given))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output(fused, batch), output(plain, batch))
    attn = plain.mid_block.attentions[0].transformer_blocks[0].attn1
    twin = fused.mid_block.attentions[0].transformer_blocks[0].attn1
    x, states = torch.randn(1, 4, 24), torch.randn(1, 6, 24)
    # its output projection stays fused, and rounds as the CPU's matrix product does
    torch.testing.assert_close(twin(x, encoder_hidden_states=states), attn(x, encoder_hidden_states=states))


def test_fusing_merging_and_saving_go_together(pristine_unet, batch, tmp_path):
    plain, fused = with_lora(pristine_unet), with_lora(pristine_unet)
    before = base_weights(fused)
    fuse_lora(fused)
    assert_same_tensors(base_weights(fused), before)
    expected = output(plain, batch)
    paths = [save_lora_weights(unet, tmp_path / f"{i}.safetensors") for i, unet in enumerate((plain, fused))]
    assert_same_tensors(*(safetensors.torch.load_file(path) for path in paths))
    merge_lora(fused)
    torch.testing.assert_close(output(fused, batch), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="merged"):
        fuse_lora(fused)
    unmerge_lora(fused)
    assert_same_tensors(base_weights(fused), before)
    torch.testing.assert_close(output(fused, batch), expected)


def test_a_weight_changed_between_forward_and_backward_is_an_error(pristine_unet, batch):
    unet = with_lora(pristine_unet)
    fuse_lora(unet)
    loss = unet(*batch).sample.square().mean()
    randomise(unet, seed=9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# The plain formula is the one that trains


def double(self, x):
    return 2 * plain_forward(self, x)


def with_dropout(self, x):
    return plain_forward(self, torch.nn.functional.dropout(x, 0.5))


def without_bias_of_the_base(self, attn, names, x):
    return tuple(self.lora[name](x) for name in names)


def mean_over_tokens(self, x):
    assert x.ndim == 3  # as in training
    return plain_forward(self, x - x.mean(1, keepdim=True))


def by_heads(self, attn, names, x):
    return tuple(part / attn.scale for part in plain_project(self, attn, names, x))  # which a toy attention lacks


plain_forward, plain_project = LoRALinearLayer.forward, LoRAAttnProcessor.project


@pytest.mark.parametrize(
    "owner, name, change",
    [
        (LoRALinearLayer, "forward", double),
        (LoRALinearLayer, "forward", with_dropout),
        (LoRALinearLayer, "forward", mean_over_tokens),
        (LoRAAttnProcessor, "project", without_bias_of_the_base),
        (LoRAAttnProcessor, "project", by_heads),
    ],
)
def test_a_changed_plain_formula_is_never_replaced(pristine_unet, batch, monkeypatch, owner, name, change):
    assert fuse_lora(with_lora(pristine_unet))
    monkeypatch.setattr(owner, name, change)
    unet, plain = with_lora(pristine_unet), with_lora(pristine_unet)
    assert not fuse_lora(unet)
    torch.manual_seed(0)
    expected = output(plain, batch)
    torch.manual_seed(0)
    assert torch.equal(output(unet, batch), expected)


def test_the_comparison_draws_nothing_from_the_global_generator(pristine_unet):
    unet = with_lora(pristine_unet)
    before = torch.get_rng_state()
    fuse_lora(unet)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rank, alpha", [(1, 1), (4, 8), (64, 2048), (128, 64)])
def test_the_comparison_passes_at_every_rank_and_scale(pristine_unet, rank, alpha):
    assert fuse_lora(with_lora(pristine_unet, rank, alpha))


def test_layers_of_unequal_scale_are_not_fused_and_no_grad_is_no_matter(pristine_unet):
    unequal = with_lora(pristine_unet)
    next(iter(lora_modules(unequal).values())).scale *= 3
    assert not fuse_lora(unequal)
    with torch.no_grad():
        assert fuse_lora(with_lora(pristine_unet))
