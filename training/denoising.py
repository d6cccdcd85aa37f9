"""What an optimizer step draws, its denoising loss and that loss's gradient; and the validation loss.

All randomness of step s comes from (seed, s) and is drawn for the whole effective batch at once. Micro-batches and
processes take slices of it, so none of them changes the step, and a resumed run needs no generator's state.

Letters in shapes: n images of a batch, b of a micro-batch, C latent channels, h w latent, T tokens, D text width.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from training.bases import BaseModelError
from training.encoding import EncodedDataset, send
from training.files import grouped
from training.memory import free_memory, if_memory_lasts

VALIDATION_STRATA = 4  # timesteps per held-out face
VALIDATION_FACES = 2  # that pass together
BAD_LOSS = 0.5  # of a base before training, as a share of predicting 0; Stable Diffusion has about 0.1


@dataclass(frozen=True)
class Batch:
    """All that is random about one optimizer step, for the whole effective batch of n images."""

    faces: torch.Tensor  # (n,) faces
    texts: torch.Tensor  # (n,) indices into dataset.texts; 0 is ""
    timesteps: torch.Tensor  # (n,)
    noise: torch.Tensor | list[torch.Tensor]  # (n, C, h, w); n of (C, h, w) if the images' shapes differ
    posterior_noise: torch.Tensor | list[torch.Tensor]  # the same: which latent of the VAE's posterior
    loss_weights: torch.Tensor  # (n,)

    def __len__(self) -> int:
        return len(self.faces)

    def of_one_shape(self, images: torch.Tensor) -> list["Batch"]:
        """These images in batches of one shape each, so that they can pass together."""
        by_shape = grouped(images.tolist(), (self.noise[image].shape for image in images.tolist()))

        def take(values, chosen: list[int]) -> torch.Tensor:
            return values[chosen] if torch.is_tensor(values) else torch.stack([values[image] for image in chosen])

        columns = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return [Batch(*(take(values, chosen) for values in columns)) for chosen in by_shape.values()]

    def to(self, device: torch.device) -> "Batch":
        """All of one shape."""
        return Batch(*(send(getattr(self, field.name), device) for field in dataclasses.fields(self)))


def seeded(*numbers: int) -> torch.Generator:
    """A generator that depends on these numbers alone, so a step can be repeated without repeating those before it."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def draw_batch(
    dataset, positions, seed: int, step: int, latent_shape: tuple | list[tuple], num_timesteps: int, dropout: float
) -> Batch:
    """Draw captions, timesteps and noise for the training faces at `positions`, from (seed, step) alone.

    Args:
        positions: n of dataset.epoch_order()'s values.
        latent_shape: (C, h, w), or a list with that of each face.
        dropout: share of the captions replaced by "", in [0, 1].
    """
    count, generator = len(positions), seeded(seed, 3, step)
    faces = torch.tensor([dataset.train[position] for position in positions])
    choice = torch.rand(count, generator=generator)
    variants = [dataset.text_indices[face] for face in faces.tolist()]
    texts = torch.tensor([texts[int(u * len(texts))] for u, texts in zip(choice.tolist(), variants, strict=True)])
    texts[torch.rand(count, generator=generator) < dropout] = 0
    # Stratified timesteps: one from each n-th of the noise schedule, so a step's loss says more and varies less.
    strata = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    timesteps = (strata / count * num_timesteps).long().clamp(max=num_timesteps - 1)
    shapes = [latent_shape[face] if isinstance(latent_shape, list) else latent_shape for face in faces.tolist()]
    noise, posterior_noise = (_draw_noise(shapes, generator) for _ in range(2))
    loss_weights = torch.from_numpy(dataset.loss_weights()[list(positions)]).float()
    return Batch(faces, texts, timesteps, noise, posterior_noise, loss_weights)


def _draw_noise(shapes: list[tuple], generator: torch.Generator) -> torch.Tensor | list[torch.Tensor]:
    """Normal noise of these shapes: one tensor if they are all the same, else one per shape."""
    if len(set(shapes)) == 1:
        return torch.randn(len(shapes), *shapes[0], generator=generator)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def denoising_losses(unet, scheduler, latents, text_embeddings, timesteps, noise) -> torch.Tensor:
    """Mean squared error of the predicted noise, one value per image: |e - e_theta(x_t, t, c)|^2. Shape: (b,) float32.

    DDPM (Ho et al. 2020), equation 14. A base that predicts v (Salimans & Ho 2022) gets that target. text_embeddings
    come in the UNet's precision (asking `unet.dtype` walks through all its modules: 2 ms a time).
    """
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_v else noise
    prediction = unet(noisy_latents.to(text_embeddings.dtype), timesteps, text_embeddings, return_dict=False)[0]
    precise = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    return (prediction.to(precise) - target.to(precise)).square().mean(dim=(1, 2, 3))


def share_of_loss(unet, scheduler, latents, text_embeddings, timesteps, noise, loss_weights, count) -> torch.Tensor:
    """What b images add to the loss of their batch of `count`: the sum of weight x denoising loss, over count."""
    losses = denoising_losses(unet, scheduler, latents, text_embeddings, timesteps, noise)
    return (losses * loss_weights).sum() / count


def accumulate_gradients(
    unet, scheduler, encoded: EncodedDataset, batch: Batch, share: torch.Tensor, micro_batch: int, scaler, graphed=None
) -> torch.Tensor:
    """Add to .grad the gradient of this process's share of the batch's loss; returns that share of the loss.

    The batch's loss is the sum over its images of weight x denoising loss, over the number of images really in it:
    an epoch's last, partial batch counts each image as much as the others do, and neither the micro-batch nor the
    number of processes changes the step. Images of different shapes pass one shape after the other.

    Args:
        share: which of the batch's n images are this process's.
        micro_batch: images per pass through the UNet.
        scaler: a GradScaler; the gradient is times its scale.
        graphed: passes micro_batch images forward and back by itself: see training/graphs.py.
    """
    device, count = encoded.device, len(batch)
    total = torch.zeros((), device=device)
    for alike in batch.of_one_shape(share):
        mean, std = encoded.posteriors(alike.faces.tolist())
        text_embeddings, mine = encoded.embeddings(alike.texts.tolist()), alike.to(device)
        latents = mean + std * mine.posterior_noise
        for start in range(0, len(mine), micro_batch):
            columns = (latents, text_embeddings, mine.timesteps, mine.noise, mine.loss_weights)
            inputs = [column[start : start + micro_batch] for column in columns]
            if graphed is not None and len(inputs[0]) == micro_batch:
                loss = graphed(*inputs, count)
            else:
                loss = share_of_loss(unet, scheduler, *inputs, count)
                scaler.scale(loss).backward()
            total = total + loss.detach()
    return total


def sum_over_processes(*tensors: torch.Tensor) -> None:
    """All-reduce in place; nothing to do for a single process."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def read_later(values: torch.Tensor) -> Callable[[], list[float]]:
    """Start copying a few numbers off the device; the function returned waits for them.

    A GPU computes behind the program's back. Asking for a number at once would let it idle at every step, until the
    next step is drawn and launched.
    """
    if values.device.type != "cuda":
        numbers = values.tolist()
        return lambda: numbers
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read


def one_late(results: Iterable, device: torch.device) -> Iterator:
    """The same items, on a GPU each only once the next is there: a step's numbers are read while the next computes."""
    waiting, late = [], int(device.type == "cuda")
    for result in results:
        waiting.append(result)
        if len(waiting) > late:
            yield waiting.pop(0)
    yield from waiting


@torch.no_grad()
def validate(
    unet, scheduler, dataset, encoded: EncodedDataset, seed: int, process=(0, 1), is_stopping=lambda: False, faces=None
) -> tuple[float, float] | None:
    """(mean, its standard error) of the denoising loss over the held-out faces, the same noise every time.

    The first pack of captions, one timestep from each quarter of the noise schedule per face. The training loss mostly
    tells which timesteps were drawn; this one moves only when the weights do. Its standard error is that of other
    faces, not of other noise.

    Args:
        process: (rank, number of processes): each takes its share of the faces.
        is_stopping: asked before each pass; once it says yes, None is returned.
        faces: others than those held out.
    """
    faces = faces or dataset.validation
    device, count = encoded.device, len(faces)
    of_faces = torch.zeros(count, dtype=torch.float64)
    mine = range(process[0], count, process[1])
    for some in grouped(mine, (dataset.faces[faces[position]].shape for position in mine)).values():
        for start in range(0, len(some), VALIDATION_FACES):
            if is_stopping():
                return None
            positions = some[start : start + VALIDATION_FACES]
            own = [faces[position] for position in positions]
            latents, _ = encoded.posteriors(own)
            texts = encoded.embeddings([dataset.first_text[face] for face in own])
            timesteps, noise = [], []
            for position in positions:
                generator = seeded(seed, 4, position)
                strata = torch.arange(VALIDATION_STRATA) + torch.rand(VALIDATION_STRATA, generator=generator)
                timesteps.append((strata / VALIDATION_STRATA * scheduler.config.num_train_timesteps).long())
                noise.append(torch.randn(VALIDATION_STRATA, *latents.shape[1:], generator=generator))
            latents, texts = (of_face.repeat_interleave(VALIDATION_STRATA, dim=0) for of_face in (latents, texts))
            timesteps, noise = (torch.cat(drawn).to(device) for drawn in (timesteps, noise))
            losses = _in_smaller_passes(unet, scheduler, latents, texts, timesteps, noise)
            losses = losses.cpu().double()  # on the CPU: not every device has float64
            of_faces[positions] = losses.unflatten(0, (-1, VALIDATION_STRATA)).mean(dim=1)
    of_faces = of_faces.float().to(device)
    sum_over_processes(of_faces)
    of_faces = of_faces.cpu().double()
    return of_faces.mean().item(), (of_faces.std() / math.sqrt(count)).item()


def _in_smaller_passes(unet, scheduler, *images: torch.Tensor) -> torch.Tensor:
    """denoising_losses(), in one pass if memory suffices, else image by image."""
    with if_memory_lasts():
        return denoising_losses(unet, scheduler, *images)
    free_memory(images[0].device)  # here, where the error no longer holds on to what filled it
    one_by_one = zip(*(tensor.split(1) for tensor in images), strict=True)
    return torch.cat([denoising_losses(unet, scheduler, *image) for image in one_by_one])


def check_prediction(unet, scheduler, rest: tuple, loss: float | None, where: str, log: Callable) -> None:
    """Is the base what its scheduler's config says, one that predicts the noise, or v? Told before the first step.

    Declared wrongly, it would seem to train, and never draw anything. A loss is held against that of predicting 0,
    which for the noise is 1, for v less.

    Args:
        rest: the other arguments of validate(), with which it found this loss of the base as it is; None = not yet.
        where: the file that declares it.

    Raises BaseModelError: the other prediction_type fits, this one doesn't.
    """

    def zero(noisy_latents, *_, **__) -> tuple[torch.Tensor]:
        return (torch.zeros_like(noisy_latents),)

    declared = scheduler.config.prediction_type
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[declared]
    loss = loss or (validate(unet, scheduler, *rest) or [0.0])[0]
    guess = loss > BAD_LOSS / 4 and validate(zero, scheduler, *rest)  # predicting 0 costs more than a quarter
    if not guess or not loss > BAD_LOSS * guess[0]:
        return
    another = type(scheduler).from_config(scheduler.config, prediction_type=other)
    found = [validate(network, another, *rest) for network in (unet, zero)]
    if all(found) and (share := found[0][0] / found[1][0]) < min(BAD_LOSS, loss / guess[0] / 2):
        why = f"the base predicts something else than it says (error {loss / guess[0]:.0%}, with the other {share:.0%})"
        raise BaseModelError(f'{why}: in {where} set "prediction_type": "{other}" instead of "{declared}"')
    log(f"This base hardly predicts these faces (error {loss / guess[0]:.0%}): is it whole, and the right one?")
