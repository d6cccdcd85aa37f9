"""The judge of coherence: a small network that learns, from the artist's own faces, to tell whole ones from damaged.

Trained anew for each evaluation, in under half a minute on two cores; nothing else is needed. It has never seen the
damage that a bad LoRA does, only some of everything that a face isn't: parts in disorder, gone, smeared, twice, turned.

S is JUDGED pixels a side. Always on the CPU, and always the same from a seed and a number of threads.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

STEPS, BATCH, RATE = 160, 48, 3e-3  # of the training; half of a batch is damaged
GRID = 32  # pixels a side after the first convolutions
PASS = 0.95  # of the artist's held-out faces
RELIABLE = 0.5  # share of damaged faces that it must catch to be believed
TRIES = 2  # at learning that much


def as_tensor(pictures: np.ndarray) -> torch.Tensor:
    """Shape: (n, S, S, 3), uint8 -> (n, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Damage:
    """Damages faces, at random from a seed. Shape, of every kind: face and another face, (3, S, S) -> (3, S, S)."""

    def __init__(self, side: int, generator: torch.Generator):
        self.side, self.generator = side, generator
        self.kinds = (self.shuffled, self.erased, self.smeared, self.doubled, self.turned)

    def __call__(self, faces: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Each face damaged in one way. Shape: (n, 3, S, S) twice -> (n, 3, S, S)."""
        return torch.stack([self.kinds[self.whole(0, 4)](*pair) for pair in zip(faces, others, strict=True)])

    def real(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand(1, generator=self.generator).item()

    def whole(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(torch.randint(low, high + 1, (1,), generator=self.generator))

    def box(self, low: float, high: float, unit: int = 1) -> tuple[slice, slice]:
        """Rows and columns of a part, each side low to high of the picture's and a multiple of unit."""
        spans = []
        for _ in range(2):
            length = max(2, int(self.side * self.real(low, high)) // unit) * unit
            start = self.whole(0, self.side - length)
            spans.append(slice(start, start + length))
        return tuple(spans)

    def shuffled(self, face, other):
        """Tiles of a part, in another order."""
        tile = max(3, self.side // self.whole(4, 12))
        part = (slice(None), *self.box(0.35, 0.95, tile))
        rows, columns = (len(range(*span.indices(self.side))) // tile for span in part[1:])
        tiles = face[part].reshape(3, rows, tile, columns, tile).permute(1, 3, 0, 2, 4).flatten(0, 1)
        tiles = tiles[torch.randperm(len(tiles), generator=self.generator)].reshape(rows, columns, 3, tile, tile)
        face = face.clone()
        face[part] = tiles.permute(2, 0, 3, 1, 4).reshape(3, rows * tile, columns * tile)
        return face

    def erased(self, face, other):
        """A part in one colour: its own, that of a pixel, or any."""
        part, spot = (slice(None), *self.box(0.25, 0.7)), (self.whole(0, self.side - 1), self.whole(0, self.side - 1))
        colours = (face[part].flatten(1).median(dim=1).values, face[part].mean(dim=(1, 2)), face[:, *spot])
        colours += (torch.rand(3, generator=self.generator) * 2 - 1,)
        face = face.clone()
        face[part] = colours[self.whole(0, 3)][:, None, None]
        return face

    def smeared(self, face, other):
        """Blurred, evenly or one way, all of it or a part; or warped."""
        if self.whole(0, 2) == 0:
            cells = self.whole(4, 8)
            shift = self.real(0.06, 0.2) * torch.randn(1, 2, cells, cells, generator=self.generator)
            shift = F.interpolate(shift, (self.side, self.side), mode="bicubic", align_corners=False)
            straight = F.affine_grid(torch.eye(2, 3)[None], (1, 3, self.side, self.side), align_corners=False)
            grid = straight + shift.permute(0, 2, 3, 1)
            return F.grid_sample(face[None], grid, padding_mode="border", align_corners=False)[0]
        radius = self.whole(1, self.side // 12)
        radii = ((radius, radius), (0, 2 * radius), (2 * radius, 0))[self.whole(0, 2)]
        blurred = face[None]
        for _ in range(2):
            padded = F.pad(blurred, (radii[1], radii[1], radii[0], radii[0]), mode="replicate")
            blurred = F.avg_pool2d(padded, (2 * radii[0] + 1, 2 * radii[1] + 1), stride=1)
        part = (slice(None), *self.box(0.3, 0.9)) if self.whole(0, 2) else slice(None)
        face = face.clone()
        face[part] = blurred[0][part]
        return face

    def doubled(self, face, other):
        """Seen twice, shifted; mixed with another face; or with a part copied to another place."""
        kind, share = self.whole(0, 2), self.real(0.3, 0.7)
        if kind == 0:
            far = [self.whole(self.side // 12, self.side // 5) * (2 * self.whole(0, 1) - 1) for _ in range(2)]
            return torch.lerp(face, face.roll(far, dims=(1, 2)), share)
        if kind == 1:
            return torch.lerp(face, other, share)
        rows, columns = self.box(0.2, 0.5)
        height, width = rows.stop - rows.start, columns.stop - columns.start
        top, left = self.whole(0, self.side - height), self.whole(0, self.side - width)
        copied = face.clone()
        copied[:, top : top + height, left : left + width] = face[:, rows, columns]
        return copied

    def turned(self, face, other):
        """Upside down or on its side, all of it or a part."""
        if self.whole(0, 1):
            return face.flip(1) if self.whole(0, 1) else torch.rot90(face, self.whole(1, 3), (1, 2))
        part = (slice(None), *self.box(0.35, 0.9))
        face = face.clone()
        face[part] = face[part].flip(1, 2) if self.whole(0, 1) else face[part].flip(1)
        return face


def network(side: int) -> nn.Sequential:
    """Pictures (n, 3, S, S) to one number each (n, 1), high for whole faces. The last layer sees what is where."""
    layers, channels = [], 3
    strides = [2] * int(np.log2(side // GRID)) + [2, 1, 2, 1]
    for width, stride in zip((12, 16, 32, 40, 48, 48)[-len(strides) :], strides, strict=True):
        layers += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(channels * (GRID // 4) ** 2, 1))


@torch.no_grad()
def logits(model: nn.Sequential, pictures: torch.Tensor) -> np.ndarray:
    """Shape: (n, 3, S, S) -> (n,)."""
    return torch.cat([model(part)[:, 0] for part in pictures.split(BATCH)]).numpy()


class Judge:
    """Says which pictures are whole faces as this artist draws them; learns TRIES times at most; the best counts.

    faces: (n, S, S, 3), uint8: learnt from. held_out: (m, S, S, 3): of these it passes 95 % at least.

    Attributes: caught: which share of the held-out faces, damaged, don't pass. is_reliable: it is at least RELIABLE. Of
    few and very different pictures it learns next to nothing, and would let anything pass.
    """

    def __init__(self, faces: np.ndarray, held_out: np.ndarray, seed: int):
        # Where damage stays far below the faces, the mark is in the middle: 4 faces alone don't tell it well
        self.caught, own = -1.0, as_tensor(held_out)
        for attempt in range(TRIES):
            generator = torch.Generator().manual_seed(seed + 1000 * attempt)
            damage = Damage(faces.shape[1], generator)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + 1000 * attempt)
                model = self._train(as_tensor(faces), damage, generator)
            many = own.repeat(8, 1, 1, 1)
            whole, damaged = logits(model, own), logits(model, damage(many, many.roll(1, 0)))
            lowest = np.quantile(whole, 1 - PASS, method="lower")
            mark = min(lowest, (lowest + np.quantile(damaged, PASS)) / 2)
            caught = float((damaged < mark).mean())
            if caught > self.caught:
                self.network, self.mark, self.caught = model, mark, caught
            self.is_reliable = self.caught >= RELIABLE
            if self.is_reliable:
                break

    def _train(self, faces: torch.Tensor, damage: Damage, generator: torch.Generator) -> nn.Sequential:
        model = network(faces.shape[2]).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.2)
        is_whole = (torch.arange(BATCH) < BATCH // 2).float()
        for _ in range(STEPS):
            drawn, others = faces[torch.randint(0, len(faces), (2, BATCH), generator=generator)]
            drawn = torch.cat([drawn[: BATCH // 2], damage(drawn[BATCH // 2 :], others[BATCH // 2 :])])
            predicted = model(self._varied(drawn, generator))[:, 0]
            loss = F.binary_cross_entropy_with_logits(predicted, is_whole)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return model.eval()

    @staticmethod
    def _varied(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """What must make no difference: place, sharpness, brightness, a tint, noise; each a little."""

        def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
            return low + (high - low) * torch.rand(len(pictures), *shape, generator=generator)

        theta = torch.eye(2, 3).repeat(len(pictures), 1, 1)
        theta[:, 0, 0] = theta[:, 1, 1] = uniform(0.93, 1.07)
        theta[:, :, 2] = uniform(-0.06, 0.06, 2)
        grid = F.affine_grid(theta, pictures.shape, align_corners=False)
        pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
        blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        pictures = torch.lerp(pictures, blurred, uniform(-0.5, 0.25, 1, 1, 1))
        pictures = pictures * uniform(0.92, 1.03, 1, 1, 1) + uniform(-0.04, 0.04, 1, 1, 1)
        pictures = pictures + uniform(-0.03, 0.03, 3, 1, 1)
        noise = torch.randn(pictures.shape, generator=generator)
        return (pictures + 0.02 * noise).clamp(-1, 1)

    def passes(self, pictures: np.ndarray) -> np.ndarray:
        """Which of (n, S, S, 3), uint8, are whole. Shape: (n,) bool."""
        return logits(self.network, as_tensor(pictures)) >= self.mark
