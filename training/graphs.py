"""Passes through the UNet and back as CUDA graphs: an optional drop-in, the same kernels on the same numbers.

A pass through Stable Diffusion's UNet and back launches some 3,000 kernels. That takes the CPU longer than a fast GPU
needs to run them. Recorded once, they are launched as one.
"""

from collections.abc import Callable

import torch

from lora_layers import lora_parameters
from training.denoising import share_of_loss

WARM_UP = 3  # passes before the recording, in which the libraries choose their algorithms and take their memory


class Graphed:
    """function(*inputs), recorded once for each shape of its inputs, then replayed. On a CUDA device alone.

    The function may not wait for the device, draw random numbers, or keep anything between calls. All else that it
    reads (weights, the loss scale) is read from where it lay when it was recorded. What is returned lies where the
    next call writes. Inputs that aren't tensors are constants of a recording.

    `failure` says why the function is called as it is from now on: it couldn't be recorded. The log says so, too.
    """

    def __init__(self, function: Callable, log: Callable = print):
        self.function, self.log, self.recordings, self.pool, self.failure = function, log, {}, None, ""

    def __call__(self, *inputs):
        key = tuple((x.shape, x.dtype) if torch.is_tensor(x) else x for x in inputs)
        if key not in self.recordings and not self.failure:
            try:
                self.recordings[key] = self._record(inputs)
            except RuntimeError as error:
                self.failure = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self.log(f"CUDA graphs can't be recorded here, a little slower without: {self.failure}")
        if self.failure:
            self.recordings.clear()
            return self.function(*inputs)
        graph, places, results = self.recordings[key]
        for place, x in zip(places, inputs, strict=True):
            if torch.is_tensor(x):
                place.copy_(x, non_blocking=True)
        graph.replay()
        return results

    def _record(self, inputs) -> tuple:
        """(the graph, where its inputs lie, what it returns)"""
        places = [x.detach().clone() if torch.is_tensor(x) else x for x in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self.function(*places)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            results = self.function(*places)
        self.pool = graph.pool()  # for the next: no two of them run at the same time
        return graph, places, results


class GraphedPass:
    """A pass through the UNet and back: adds the LoRA's gradient, times the loss scale, to weights.grad.

    weights: all LoRA weights as one vector, as flatten_lora() makes it.
    """

    def __init__(self, unet, scheduler, scaler, weights: torch.Tensor, log: Callable = print):
        layers = lora_parameters(unet)

        def loss_and_gradient(*inputs) -> tuple[torch.Tensor, torch.Tensor]:
            loss = share_of_loss(unet, scheduler, *inputs)
            gradients = torch.autograd.grad(scaler.scale(loss), layers)
            return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])

        self.graphed, self.weights = Graphed(loss_and_gradient, log), weights

    def __call__(self, *inputs) -> torch.Tensor:
        """share_of_loss()'s arguments from `latents` on, and its result."""
        loss, gradient = self.graphed(*inputs)
        self.weights.grad.add_(gradient)
        return loss
