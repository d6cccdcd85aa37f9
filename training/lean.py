"""The frozen parts of the UNet, keeping less for the backward pass: an optional drop-in, bit for bit the same.

What autograd keeps serves the gradients of weights, too, and the base's have none: so a convolution's input need not be
kept. And if memory is short, what is cheap to compute (a norm with its SiLU, a gate) is computed again instead of kept.
keep_less() compares every kind of module that it changes with diffusers' own forward first, gradients included; where
they differ it leaves them alone.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _FrozenConvolution(torch.autograd.Function):
    """A convolution whose weights aren't trained: its input isn't kept, the gradient needs the weights alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, *options):
        ctx.save_for_backward(weight)
        ctx.shape, ctx.options = x.shape, options
        return F.conv2d(x, weight, bias, *options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (weight,), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.options
        x = gradient.new_empty(ctx.shape)  # of which only the shape matters; an expanded one would be copied
        options = (None, stride, padding, dilation, False, (0, 0), groups, (True, False, False))
        x_gradient = torch.ops.aten.convolution_backward(gradient, x, weight, *options)[0]
        return x_gradient, *[None] * (2 + len(ctx.options))


class _Again(torch.autograd.Function):
    """function(x), of which only x is kept: what lies between is cheap, and computed again for the gradient."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.save_for_backward(x)
        ctx.function = function
        return function(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            y = ctx.function(x)
        return torch.autograd.grad(y, x, gradient)[0], None


@dataclass
class Switch:
    """Whether what is cheap is computed again, in all of a UNet: unet.cheap_twice."""

    is_on: bool = False

    def __call__(self, function: Callable, x: Tensor) -> Tensor:
        is_used = self.is_on and torch.is_grad_enabled() and x.requires_grad
        return _Again.apply(x, function) if is_used else function(x)


def convolve(_, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """nn.Conv2d's own forward. Shape: (B, in, H, W) -> (B, out, H', W')."""
    options = (conv.stride, conv.padding, conv.dilation, conv.groups)
    is_frozen = torch.is_grad_enabled() and x.requires_grad and not conv.weight.requires_grad
    if not is_frozen or torch.is_autocast_enabled(x.device.type) or conv.padding_mode != "zeros":
        return type(conv).forward(conv, x)
    return _FrozenConvolution.apply(x, conv.weight, conv.bias, *options)


def residual(again: Switch, block: nn.Module, x: Tensor, temb: Tensor, *_, **__) -> Tensor:
    """diffusers' ResnetBlock2D as SD uses it: twice norm, SiLU, convolution; the timestep in between.

    Shape: (B, C, H, W), (B, time width) -> (B, C', H, W).
    """
    hidden = block.conv1(again(lambda x: F.silu(block.norm1(x)), x))
    hidden = hidden + block.time_emb_proj(F.silu(temb))[:, :, None, None]
    hidden = block.conv2(again(lambda x: F.silu(block.norm2(x)), hidden))
    x = x if block.conv_shortcut is None else block.conv_shortcut(x.contiguous())
    return (x + hidden) / block.output_scale_factor


def gated(again: Switch, geglu: nn.Module, x: Tensor, *_, **__) -> Tensor:
    """diffusers' GEGLU (Shazeer 2020): half of the projection times GELU of the other. (B, T, C) -> (B, T, C')."""

    def gate(projected: Tensor) -> Tensor:
        value, opening = projected.chunk(2, dim=-1)
        return value * geglu.gelu(opening)

    return again(gate, geglu.proj(x))


KINDS = {"Conv2d": convolve, "ResnetBlock2D": residual, "GEGLU": gated}


def keep_less(unet: nn.Module) -> bool:
    """Let all modules of KINDS in the UNet run as here. To be called after unet.to(device, dtype), on a frozen base.

    Returns whether it did: False, and nothing is changed, if diffusers computes something else by now.
    """
    modules = [module for module in unet.modules() if type(module).__name__ in KINDS]
    examples = {type(module).__name__: module for module in modules}  # the last of each kind: a small one
    if not all(_is_the_same(functools.partial(KINDS[kind], Switch(True)), some) for kind, some in examples.items()):
        return False
    unet.cheap_twice = Switch()
    for module in modules:
        module.forward = functools.partial(KINDS[type(module).__name__], unet.cheap_twice, module)
    return True


def _is_the_same(function: Callable, module: nn.Module) -> bool:
    """Whether it gives the module's own result, and gradient of the input, on small noise."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)

    kind = type(module).__name__
    shape = (2, 6, weight.shape[-1]) if kind == "GEGLU" else (2, module.in_channels, 8, 8)
    x = noise(*shape).requires_grad_()
    more = [noise(2, module.time_emb_proj.in_features)] if kind == "ResnetBlock2D" else []
    try:
        answers = []
        for forward in (functools.partial(type(module).forward, module), functools.partial(function, module)):
            y = forward(x, *more)
            answers.append(torch.cat([y.flatten(), torch.autograd.grad(y.square().sum(), x)[0].flatten()]).float())
    except Exception:  # a module that asks for something else
        return False
    return ((answers[0] - answers[1]).norm() <= 1e-3 * answers[0].norm()).item()
