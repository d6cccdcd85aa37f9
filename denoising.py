"""The arithmetic of one optimizer step: what it draws, the denoising loss, its gradient; and the validation loss.

All randomness of step s comes from (seed, s) and is drawn for the whole effective batch at once. Micro-batches and
processes take slices of it, so none of them changes the step, and a resumed run needs no generator's state.

Letters in shapes: n images of a window, b of a micro-batch, C latent channels, h w latent, T tokens, D text width.
"""

from dataclasses import dataclass

import numpy as np
import torch

from dataset import EncodedDataset, MangaFaceDataset

VALIDATION_STRATA = 8  # timesteps per held-out face


@dataclass(frozen=True)
class Window:
    """All that is random about one optimizer step, for the whole effective batch of n images."""

    faces: torch.Tensor  # (n,) indices into dataset.samples
    texts: torch.Tensor  # (n,) indices into dataset.texts; 0 is ""
    timesteps: torch.Tensor  # (n,)
    noise: torch.Tensor  # (n, C, h, w)
    posterior_noise: torch.Tensor  # (n, C, h, w): which latent of the VAE's posterior
    loss_weights: torch.Tensor  # (n,)

    def __len__(self) -> int:
        return len(self.faces)


def seeded(*numbers: int) -> torch.Generator:
    """A generator that depends on these numbers alone, so a step can be repeated without repeating those before it."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def draw_window(
    dataset: MangaFaceDataset, positions, seed: int, step: int, latent_shape: tuple, num_timesteps: int, dropout: float
) -> Window:
    """Draw captions, timesteps and noise for the training faces at `positions`, from (seed, step) alone.

    Args:
        positions: n of dataset.epoch_order()'s values.
        latent_shape: (C, h, w).
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
    noise = torch.randn(count, *latent_shape, generator=generator)
    posterior_noise = torch.randn(count, *latent_shape, generator=generator)
    loss_weights = torch.from_numpy(dataset.loss_weights()[list(positions)]).float()
    return Window(faces, texts, timesteps, noise, posterior_noise, loss_weights)


def denoising_losses(unet, scheduler, latents, text_embeddings, timesteps, noise) -> torch.Tensor:
    """Mean squared error of the predicted noise, one value per image: |e - e_theta(x_t, t, c)|^2. Shape: (b,) float32.

    DDPM (Ho et al. 2020), equation 14. A base that predicts v (Salimans & Ho 2022) gets that target.
    """
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_v else noise
    prediction = unet(noisy_latents.to(unet.dtype), timesteps, text_embeddings.to(unet.dtype), return_dict=False)[0]
    precise = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    return (prediction.to(precise) - target.to(precise)).square().mean(dim=(1, 2, 3))


def accumulate_gradients(
    unet, scheduler, encoded: EncodedDataset, window: Window, rows: torch.Tensor, batch_size: int, scaler
) -> torch.Tensor:
    """Add to .grad the gradient of this process's part of the window's loss; returns that part of the loss.

    The window's loss is the sum over its images of weight x denoising loss, over the number of images really in it:
    an epoch's last, partial window counts each image as much as the others do, and neither the micro-batch nor the
    number of processes changes the step.
    """
    device, total = encoded.latent_mean.device, torch.zeros((), device=encoded.latent_mean.device)
    for part in rows.split(batch_size):
        faces, noise = window.faces[part].to(device), window.noise[part].to(device)
        latents = encoded.latent_mean[faces] + encoded.latent_std[faces] * window.posterior_noise[part].to(device)
        text_embeddings = encoded.text_embeddings[window.texts[part].to(device)]
        timesteps = window.timesteps[part].to(device)
        losses = denoising_losses(unet, scheduler, latents, text_embeddings, timesteps, noise)
        loss = (losses * window.loss_weights[part].to(device)).sum() / len(window)
        scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def sum_over_processes(parameters, *values) -> list[float]:
    """All-reduce gradients and `values` in one message (nothing to do for a single process); returns the sums."""
    device = parameters[0].device
    extra = torch.stack([torch.as_tensor(value, dtype=parameters[0].dtype, device=device) for value in values])
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for parameter in parameters:  # a process without images of this window adds zeros
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters] + [extra])
        torch.distributed.all_reduce(flat)
        *gradients, extra = flat.split([parameter.numel() for parameter in parameters] + [len(extra)])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad.copy_(gradient.view_as(parameter))
    return extra.tolist()


@torch.no_grad()
def validate(unet, scheduler, dataset: MangaFaceDataset, encoded: EncodedDataset, seed: int, accelerator) -> float:
    """Mean denoising loss over the held-out faces: joined captions, 8 timestep strata, the same noise every time.

    The training loss mostly tells which timesteps were drawn; this one moves only when the weights do.
    """
    device, total = encoded.latent_mean.device, torch.zeros(())
    for position in range(accelerator.process_index, len(dataset.validation), accelerator.num_processes):
        face, generator = dataset.validation[position], seeded(seed, 4, position)
        strata = torch.arange(VALIDATION_STRATA) + torch.rand(VALIDATION_STRATA, generator=generator)
        timesteps = (strata / VALIDATION_STRATA * scheduler.config.num_train_timesteps).long().to(device)
        noise = torch.randn(VALIDATION_STRATA, *encoded.latent_mean.shape[1:], generator=generator).to(device)
        latents = encoded.latent_mean[face].expand_as(noise)
        text_embeddings = encoded.text_embeddings[dataset.text_indices[face][-1]].expand(VALIDATION_STRATA, -1, -1)
        losses = denoising_losses(unet, scheduler, latents, text_embeddings, timesteps, noise)
        total += losses.float().mean().cpu()
    return accelerator.reduce(total.to(device), reduction="sum").item() / len(dataset.validation)
