"""The sentence at the end: what was learnt, what is wrong, what to change."""

from dataclasses import dataclass

import numpy as np

from dataset import FEWEST, to_hold_out_enough
from evaluation.measures import STROKES, squashed
from evaluation.pictures import start_of

HARDLY = 0.2  # of the difference between two of the base's pictures: the LoRA changes less than that
LITTLE = 0.6  # of that difference: what is wrong then is the base's still, not yet the LoRA's
LEARNT, NOT_LEARNT = 0.5, 0.25  # of a part's points
SMEARED = 0.7  # of the share of held-out faces that pass as whole; below it pictures are smeared
MANY_COPIES = 0.1  # of the pictures
BELIEVED = 0.75  # of the held-out faces have to pass, or the judge knows too little to say anything of faces
STILL_FALLING = 0.1  # of the gain in validation loss came in the second half of all learning
APART = 7.0  # Ashman's D: two styles, not one that varies
GREY = 2.0  # differences in colourfulness that are none


@dataclass(frozen=True)
class Facts:
    """What the sentence is made of; None = not known.

    moved: mean difference of the LoRA's pictures from the base's of the same prompt and seed, over that of two of the
    base's; style, obeyed: share of the points of style, of adherence; whole: share of the pictures that pass as whole
    faces, and of held-out faces; copied: different training faces that pictures copy; copies: share of the pictures;
    better: {epoch: share of whole faces} of other kept epochs; losses: (before training, lowest); start: what it was
    before.
    """

    learning_rate: float
    epochs: int
    best_epoch: int
    faces: int
    held_out: int
    losses: tuple[float, float] | None = None
    start: str = "base"
    is_falling: bool = False
    score: float | None = None
    moved: float | None = None
    style: float | None = None
    whole: tuple[float, float] | None = None
    obeyed: float = 1.0
    copied: int = 0
    copies: float = 0.0
    better: tuple[tuple[int, float], ...] = ()
    same_captions: bool = False
    styles: tuple[int, int] | None = None


def verdict(facts: Facts) -> str:
    """One or two sentences. Epochs are recommended only if their file is kept."""
    rate = f"learning_rate ({facts.learning_rate:g})"
    also = [" All captions are the same, so prompts make no difference."] if facts.same_captions else []
    if facts.styles:
        also += [f" The faces are of two styles ({facts.styles[0]} and {facts.styles[1]}): train them apart."]
    worse = facts.losses is not None and facts.losses[1] >= facts.losses[0]
    than = facts.start if worse else "base"
    little = facts.moved is not None and facts.moved < LITTLE
    if little and (facts.moved < HARDLY or (facts.style is not None and facts.style < NOT_LEARNT)):
        main = f"Hardly differs from the base: raise {rate} or num_train_epochs ({facts.epochs})."
    elif facts.copies > MANY_COPIES:
        main = f"Copies {facts.copied} of {facts.faces} training faces: fewer epochs, or more pictures."
    elif facts.held_out < FEWEST:
        remedy = to_hold_out_enough(facts.faces + facts.held_out)
        main = f"Too few faces to judge: {facts.held_out} held out, {FEWEST} are needed: {remedy}. Believe your eyes."
    elif worse or (facts.score is not None and facts.score < 0):
        first = "" if worse else "; but first see what evaluate_lora.py draws with a lower guidance_scale"
        main = f"Worse than the {than}: lower {rate}, to a quarter{first}."
    elif facts.style is None:
        main = "Learnt, by the validation loss; no pictures were drawn to judge."
    else:
        learnt = facts.style >= LEARNT
        main = f"Style {'learnt' if learnt else 'learnt in part' if facts.style >= NOT_LEARNT else 'hardly learnt'}"
        is_smeared = facts.whole is not None and facts.whole[0] < SMEARED * facts.whole[1]
        if not learnt and (little or is_smeared):  # what is wrong is the base's still
            main += f": raise {rate} or num_train_epochs ({facts.epochs})."
        elif is_smeared:
            main += f", but faces are smeared in {1 - facts.whole[0]:.0%} of the pictures: lower {rate}"
            ahead = [(whole, epoch) for epoch, whole in facts.better if whole > facts.whole[0] + 0.1]
            main += f", or take epoch {max(ahead)[1]} from candidates." if ahead else ", or show larger faces."
        else:
            main += ", faces intact." if facts.whole else "."
            if facts.is_falling and facts.best_epoch == facts.epochs:
                main += " More epochs may be better still."
            elif not learnt:
                main += f" Raise {rate} a little."
            main += " Prompts are obeyed no better than by the base." if facts.obeyed < NOT_LEARNT else ""
    return "".join([main, *also])


def moved(base: np.ndarray, own: np.ndarray) -> float:
    """How far pictures are from the base's of the same prompts and seeds, in units of how far two of those are apart.

    Shape: (n, H, W, 3) each, n >= 2.
    """
    base, own = base.astype(np.float32), own.astype(np.float32)
    return float(np.abs(own - base).mean() / max(np.abs(base - np.roll(base, 1, axis=0)).mean(), 1e-6))


def two_styles(strokes: np.ndarray, colourfulness: np.ndarray) -> tuple[int, int] | None:
    """How many faces are of each of two styles, if there are two: in colour, or along what their strokes differ in
    most, the first principal component, they fall into two heaps far apart.

    Ashman's D (Ashman et al. 1994), sqrt 2 |m1 - m2| / sqrt(s1^2 + s2^2), of the best split into two parts of at least
    a fifth each, and 8 faces, for a few fall apart by chance. Split anywhere, one normal heap has at most 3, a uniform
    one 3.5; faces of one style had at most 4.2, of two styles at least 10.8.

    Shape: (n, 512), stroke_directions() of the training faces; (n,).
    """
    centred = strokes.astype(float) - strokes.mean(axis=0)
    main = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
    for values, floor in ((main, 1e-9), (colourfulness, GREY)):
        ordered, apart = np.sort(values), {}
        least = max(8, len(ordered) // 5)
        for cut in range(least, len(ordered) - least + 1):
            low, high = ordered[:cut], ordered[cut:]
            apart[cut] = 2**0.5 * (high.mean() - low.mean()) / max(np.hypot(low.std(), high.std()), floor)
        if apart and apart[best := max(apart, key=apart.get)] > APART:
            return best, len(ordered) - best
    return None


def is_falling(losses: list[tuple[float, float]]) -> bool:
    """Whether the validation loss still fell, at the end, for the learning that was done.

    A rate that goes to 0 ends every curve flat. So progress is measured along the sum of the learning rates: is more
    than a tenth of the whole gain from its second half?

    losses: (sum of the learning rates so far, validation loss), in order, that before training first.
    """
    total, (_, start), (_, end) = losses[-1][0], losses[0], losses[-1]
    if not total:  # metrics.csv is gone
        return False
    half = next(loss for done, loss in losses if done >= total / 2)
    return end < start and half - end > STILL_FALLING * (start - end)


def facts_of(config, dataset, state, epoch: int, rates: list[float], evaluation=None, scored=None) -> Facts:
    """The facts about a run whose exported epoch is `epoch`.

    rates: the learning rate of each step; evaluation, scored {epoch: Score}: None if no pictures were drawn.
    """
    done = np.concatenate([[0.0], np.cumsum(rates)])
    known = [row for row in state.history if row.loss is not None]
    losses = [(done[min(row.epoch * state.steps_per_epoch, len(rates))], row.loss) for row in known]
    captions = {caption for face in dataset.faces for caption in face.captions}
    facts = {
        "learning_rate": config.learning_rate,
        "epochs": state.epoch,
        "best_epoch": epoch,
        "faces": len(dataset.train),
        "held_out": len(dataset.validation),
        "losses": (state.start_loss, state.best.loss) if state.best else None,
        "start": start_of(config),
        "is_falling": len(losses) > 2 and is_falling(losses),
        "same_captions": len(captions) == 1 < len(dataset.faces),
    }
    if evaluation:
        own, base = scored[epoch], evaluation.of_base
        copied = {own.references.names[own.features.nearest[n]] for n in np.flatnonzero(own.features.is_copy)}
        pictures = [squashed(some.features.pixels, 64) for some in (base, own)]
        facts |= {"score": own.score, "copied": len(copied), "copies": float(own.features.is_copy.mean())}
        facts |= {"moved": moved(*pictures) if len(pictures[0]) > 1 else None}
        real = evaluation.references
        facts["styles"] = two_styles(real.layout[:, :STROKES], real.line_art["colourfulness"])
        if own.score is not None:
            better = tuple((n, some.value["coherence"]) for n, some in scored.items() if n != epoch)
            facts |= {"style": own.value["points: style"], "better": better}
            facts["obeyed"] = own.value["points: adherence"] if "adherence" in own.ends.evidence else 1.0
            whole = (own.value["coherence"], evaluation.judge_held_out().value["coherence"])
            facts["whole"] = whole if whole[1] >= BELIEVED else None  # NaN isn't
    return Facts(**facts)
