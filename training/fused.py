"""The LoRA formula of lora_layers.py in fewer kernels: an optional drop-in for LoRAAttnProcessor.project.

Small batches on fast GPUs spend more time on launching kernels than on arithmetic. fuse_lora() compares every product
with the plain formula before it takes its place; where they differ, because somebody changed the formula, it doesn't.
"""

import torch
from torch import Tensor, nn

from lora_layers import PROJECTIONS, LoRALinearLayer, lora_modules


class FusedProjection:
    """Projections of one input, with their LoRA: two matrix products forward, six backward, for q, k and v together.

        [y | u] = x [W | A]^T      W: base weights stacked, (sum of out, in)      A: `down_weight`s, (sum of r, in)
        y += scale u B^T           B: `up_weight`s as the blocks of a diagonal, (sum of out, sum of r)

    The numbers of the plain sum, up to rounding: nothing is merged, so an fp16 base loses no small correction. The
    gradients, dy given:

        t = scale dy B      dx = dy W + t A      dA = t^T x      dB = scale dy^T u, its diagonal blocks
    """

    def __init__(self, layers: list[tuple[nn.Linear, LoRALinearLayer]]):
        linears, loras = zip(*layers, strict=True)
        weight = linears[0].weight
        self.widths, self.rank, self.scale = [linear.out_features for linear in linears], loras[0].rank, loras[0].scale
        out, rank = sum(self.widths), self.rank * len(layers)
        spare = -(out + rank) % 16  # rows of zeros: attention's half-precision kernels read whole 16 bytes
        self.stacked = weight.detach().new_zeros(out + rank + spare, linears[0].in_features)  # [W | A]
        self.up = self.stacked.new_zeros(out, rank)  # B
        biased = any(linear.bias is not None for linear in linears)
        self.bias = self.stacked.new_zeros(len(self.stacked)) if biased else None
        self.places = []  # where each layer's down_weight and up_weight are copied to
        start = 0
        for number, linear in enumerate(linears):
            end, ranks = start + linear.out_features, slice(number * self.rank, (number + 1) * self.rank)
            self.stacked[start:end] = linear.weight.detach()
            linear.weight.data = self.stacked[start:end]  # the same values: one copy of the base is enough
            if linear.bias is not None:
                self.bias[start:end] = linear.bias.detach()
            self.places += [self.stacked[out:][ranks], self.up[start:end, ranks]]
            start = end

    def fits(self, x: Tensor) -> bool:
        """Not after unet.to(...) nor under autocast: the plain sum is taken then."""
        same = x.dtype == self.stacked.dtype and x.device == self.stacked.device
        return same and not torch.is_autocast_enabled(x.device.type)

    def __call__(self, x: Tensor, layers: list[LoRALinearLayer]) -> tuple[Tensor, ...]:
        """Shape: (..., in) -> one (..., out) per layer, views of one tensor."""
        return _FusedProduct.apply(x, self, *(w for layer in layers for w in (layer.down_weight, layer.up_weight)))


class _FusedProduct(torch.autograd.Function):
    """FusedProjection's formulas. `weights` (fp32) only receive their gradients: their values are in stacked and up."""

    @staticmethod
    def forward(ctx, x, fused, *weights):
        rows = x.reshape(-1, x.shape[-1])
        stacked = fused.stacked.T
        product = rows @ stacked if fused.bias is None else torch.addmm(fused.bias, rows, stacked)
        out, rank = fused.up.shape
        y, narrow = product[:, :out], product[:, out : out + rank]
        y.addmm_(narrow, fused.up.T, alpha=fused.scale)
        if len(fused.widths) == 1:  # y isn't needed again: let its memory go
            narrow = narrow.contiguous()
        ctx.save_for_backward(rows, narrow, *weights)  # the weights for autograd's check that none was changed
        ctx.fused, ctx.shape = fused, x.shape
        return y.unflatten(0, x.shape[:-1]).split(fused.widths, dim=-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        (rows, narrow, weight, *_), fused = ctx.saved_tensors, ctx.fused
        out, rank = fused.up.shape
        gradient = (gradients[0] if len(gradients) == 1 else torch.cat(gradients, dim=-1)).reshape(-1, out)
        narrow_gradient = (gradient @ fused.up).mul_(fused.scale)
        x_gradient = None
        if ctx.needs_input_grad[0]:  # a text needs none
            x_gradient = gradient @ fused.stacked[:out]
            x_gradient = x_gradient.addmm_(narrow_gradient, fused.stacked[out : out + rank]).view(ctx.shape)
        down = (narrow_gradient.T @ rows).to(weight.dtype).split(fused.rank)
        up = (gradient.T @ narrow).to(weight.dtype).mul_(fused.scale).split(fused.widths)
        up = [block.split(fused.rank, dim=1)[number] for number, block in enumerate(up)]
        return x_gradient, None, *(part for pair in zip(down, up, strict=True) for part in pair)


class FusedProjections:
    """Stands in for a processor's `project`: the groups of projections that share an input, as one product each."""

    def __init__(self, attn: nn.Module, processor: nn.Module):
        self.plain, self.lora = type(processor).project, processor.lora
        groups = (("q",), ("k", "v"), ("out",)) if attn.is_cross_attention else (("q", "k", "v"), ("out",))
        layers = {name: (attn.get_submodule(path), self.lora[name]) for name, path in PROJECTIONS.items()}
        self.products = {names: FusedProjection([layers[name] for name in names]) for names in groups}

    def operands(self) -> list[tuple[Tensor, Tensor]]:
        """(place in an operand, weight to be copied there) of every LoRA weight."""
        pairs = []
        for names, product in self.products.items():
            layers = [self.lora[name] for name in names]
            weights = [weight for layer in layers for weight in (layer.down_weight, layer.up_weight)]
            pairs += zip(product.places, weights, strict=True)
        return pairs

    def __call__(self, attn: nn.Module, names: tuple[str, ...], x: Tensor) -> tuple[Tensor, ...]:
        """As LoRAAttnProcessor.project, which is called where the product doesn't fit or LoRA is merged."""
        product, layers = self.products.get(names), [self.lora[name] for name in names]
        if product is None or not product.fits(x) or any(layer.base_weight is not None for layer in layers):
            return self.plain(attn.processor, attn, names, x)
        return product(x, layers)


def fuse_lora(unet: nn.Module) -> bool:
    """Run self-attention's q, k, v as one product with their LoRA, cross-attention's k, v too: see FusedProjection.

    To be called after inject_lora and unet.to(device, dtype). Saving, loading and merging work as before. At each
    call of the UNet, the LoRA weights are copied into the products' operands, in the base's precision.

    Returns whether it did: False, and nothing is changed, if LoRALinearLayer's formula is no longer the one fused here.
    Raises ValueError: no LoRA is injected, or it is merged.
    """
    layers = lora_modules(unet)
    if not layers or any(layer.base_weight is not None for layer in layers.values()):
        raise ValueError("there is no LoRA to fuse in this UNet, or it is merged: unmerge_lora before fusing")
    processors = unet.attn_processors.values()
    alike = all(len({(layer.rank, layer.scale) for layer in processor.lora.values()}) == 1 for processor in processors)
    if not alike or not _is_the_plain_formula(next(iter(processors))):
        return False
    pairs = []
    for name, processor in unet.attn_processors.items():
        processor.project = FusedProjections(unet.get_submodule(name.removesuffix(".processor")), processor)
        pairs += processor.project.operands()
    alike = [pair for pair in pairs if pair[0].stride() == pair[1].stride()]  # on a GPU these go in few kernels
    unet.fused_lora = [alike, [pair for pair in pairs if pair[0].stride() != pair[1].stride()]]
    unet.register_forward_pre_hook(_refresh)
    return True


def _is_the_plain_formula(model: nn.Module) -> bool:
    """Whether the products answer as the plain sums do, gradients included, in a small attention of the same kind."""
    layer = next(iter(model.lora.values()))
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False), torch.enable_grad():
        torch.manual_seed(0)
        attn = nn.Module()
        attn.to_q, attn.to_k, attn.to_v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        attn.to_out, attn.is_cross_attention, attn.heads = nn.ModuleList([nn.Linear(6, 6)]), False, 2
        processor = type(model)(attn, layer.rank, layer.network_alpha)
        for weight in processor.parameters():
            nn.init.normal_(weight)
        plain, fused, x = processor.project, FusedProjections(attn, processor), torch.randn(2, 5, 6, requires_grad=True)
        for place, weight in fused.operands():
            place.copy_(weight.detach())

        def answer(project) -> Tensor:
            results = [y for names in fused.products for y in project(attn, names, x)]
            loss = sum(y.square().sum() for y in results)
            gradients = torch.autograd.grad(loss, (x, *processor.parameters()), materialize_grads=True)
            return torch.cat([tensor.flatten() for tensor in (*results, *gradients)])

        try:
            expected = answer(plain)
        except Exception:  # a formula that asks for more than this small attention has
            return False
        return ((answer(fused) - expected).norm() < 1e-3 * expected.norm()).item()


@torch.no_grad()
def _refresh(unet: nn.Module, _) -> None:
    for pairs in unet.fused_lora:
        if pairs and pairs[0][0].device == pairs[0][1].device:  # else unet.to(...) has left the products behind
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
