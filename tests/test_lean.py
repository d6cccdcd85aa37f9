"""training/lean.py against diffusers' own modules: equal bits, less memory, and it stands back where they change."""

import pytest
import torch
from conftest import gradients_of, output, with_lora
from diffusers.models.activations import GEGLU
from test_memory import live_bytes

from lora_layers import inject_lora
from training import memory
from training.base_model import load_unet
from training.fused import fuse_lora
from training.lean import keep_less

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("checkpointing", "cheap_twice"), [(False, False), (False, True), (True, True)])
def test_outputs_and_gradients_are_diffusers_own_to_the_last_bit(
    pristine_unet, batch, dtype, checkpointing, cheap_twice
):
    plain, lean = (with_lora(pristine_unet, size=0.05).to(dtype).train() for _ in range(2))
    for unet in (plain, lean):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        fuse_lora(unet)
    assert keep_less(lean)
    lean.cheap_twice.is_on = cheap_twice
    inputs = (batch[0].to(dtype), batch[1], batch[2].to(dtype))
    assert torch.equal(output(plain, inputs), output(lean, inputs))
    for a, b in zip(gradients_of(plain, batch), gradients_of(lean, batch), strict=True):
        assert torch.equal(a, b) and a.any()


def test_a_backward_pass_holds_less_and_the_plans_count_it(tiny_base):
    shapes, measured = ((4, 32, 32), (77, 16)), {}
    for is_lean in (False, True):
        unet, _ = load_unet(tiny_base, CPU, torch.float32)
        inject_lora(unet, 4, 8)
        fuse_lora(unet)
        if is_lean:
            keep_less(unet)
        plans = [plan for plan in memory.memory_plans(unet, *shapes, 2, "auto") if plan.micro_batch == 2]
        assert [plan.checkpointing for plan in plans] == ["nothing", *["cheap"] * is_lean, "largest", "all"]
        for plan in plans:
            plan.apply(unet)
            held = live_bytes(unet, shapes, 2)
            measured[is_lean, plan.checkpointing] = held
            assert held <= plan.needed <= 1.6 * held, (plan, held)
    for tier, most in {"nothing": 0.9, "cheap": 0.8, "largest": 0.9, "all": 1.05}.items():
        assert measured[True, tier] <= most * measured[False, tier if tier != "cheap" else "nothing"], tier


def test_where_diffusers_computes_something_else_nothing_is_changed(pristine_unet, batch, monkeypatch):
    plain = GEGLU.forward
    monkeypatch.setattr(GEGLU, "forward", lambda self, x, *rest: 1.01 * plain(self, x, *rest))
    unet, other = with_lora(pristine_unet), with_lora(pristine_unet)
    assert not keep_less(unet)
    assert not [module for module in unet.modules() if "forward" in vars(module)]
    assert torch.equal(output(unet, batch), output(other, batch))


def test_trained_weights_get_their_gradients_as_ever(pristine_unet, batch):
    """Whoever unfreezes a convolution of the base still trains it."""
    unet = with_lora(pristine_unet).train()
    assert keep_less(unet)
    unet.mid_block.resnets[0].conv1.weight.requires_grad_()
    gradients_of(unet, batch)
    assert unet.mid_block.resnets[0].conv1.weight.grad.any()
