"""Which epoch is the best: candidates from the lowest validation loss on, kept while training; chosen by scores."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from dataset import FEWEST
from evaluation.curves import Metrics
from evaluation.pictures import is_sampled
from evaluation.score import Evaluation, Score
from evaluation.share import examples, thumbnail
from evaluation.verdict import facts_of, verdict
from lora_layers import save_lora_weights, with_metadata
from training.checkpoint import LORA_FILES, TrainingState, Validated
from training.files import describe, discard, read_verified, write_atomic
from training.folder import MOST_KEPT
from training.memory import sparingly

CANDIDATE = "epoch-{:03d}"  # its folder


def candidate_epochs(history: list[Validated]) -> list[int]:
    """Epochs that may be the best, earliest first: from the validation minimum on, for pictures often gain after it.
    Where these are more than MOST_KEPT, every second of them, or every fourth ..., and the newest.

    Empty before the first epoch's validation, and where nothing is held out.
    """
    rows = [row for row in history if row.epoch > 0 and row.loss is not None]
    if not rows:
        return []
    best = min(rows, key=lambda row: row.loss)  # the earliest of equals
    later, every = [row.epoch for row in rows if row.epoch >= best.epoch], 1
    while len(later[::every]) > MOST_KEPT:
        every *= 2  # what is kept then was kept before
    return later[::every] + (later[-1:] if (len(later) - 1) % every else [])


def converged_epoch(state: TrainingState) -> int | None:
    """The first epoch by which validation had gained 95 % of what it gained in all; None if it gained nothing."""
    if state.best is None or state.best.loss >= state.start_loss:
        return None
    enough = state.start_loss - 0.95 * (state.start_loss - state.best.loss)
    return next(row.epoch for row in state.history if row.epoch > 0 and row.loss <= enough)


def save_epoch(folder: Path, unet, labels: dict, state: TrainingState) -> None:
    """Write this epoch's LoRA as .bin and .safetensors; each is read back and compared before it counts."""
    labels = labels | {"ss_epoch": state.epoch, "ss_steps": state.step}
    for file in LORA_FILES:
        save_lora_weights(unet, folder / file, torch.float16, labels)


def epochs_to_keep(state: TrainingState, config) -> set[int]:
    """The candidates, or without any the last epoch; and those of which there is a sheet to look at."""
    sheets = {row.epoch for row in state.history if row.epoch and is_sampled(row.epoch, config)}
    return sheets | set(candidate_epochs(state.history) or [state.epoch])


def keep_candidate(folder: Path, unet, labels: dict, state: TrainingState, config) -> None:
    """Save the epoch just done into `folder` if it is to be kept; the state notes what its files are."""
    if state.epoch in epochs_to_keep(state, config):
        own = folder / CANDIDATE.format(state.epoch)
        save_epoch(own, unet, labels, state)
        state.candidates[str(state.epoch)] = {file: describe((own / file).read_bytes()) for file in LORA_FILES}


def prune_candidates(folder: Path, state: TrainingState, config) -> None:
    """Delete those not to be kept any more. After a checkpoint that knows so: no resumed run asks for them."""
    wanted = [CANDIDATE.format(epoch) for epoch in epochs_to_keep(state, config)]
    for old in folder.glob("epoch-*"):
        if old.name not in wanted:
            discard(old)


def choose_best(losses: dict[int, float | None], scored: dict[int, Score]) -> tuple[int, str]:
    """(the best of the candidate epochs, why): the earliest whose score is within one standard error, of the paired
    difference, of the highest, for what is learnt by heart is learnt late (after Breiman et al. 1984, who take the
    simplest model within one of the best). Without scores the lowest validation loss.

    losses: {epoch: its validation loss} of all candidates.
    """
    if len(losses) == 1:
        return next(iter(losses)), "no other epoch's files are there"
    if not scored:
        lowest = min(losses, key=losses.get)
        return lowest, "the lowest validation loss (no scores: no pictures, or too few held-out faces)"
    highest = max(sorted(scored), key=lambda epoch: scored[epoch].score)
    best = next(epoch for epoch in sorted(scored) if not scored[highest].beats(scored[epoch], errors=1))
    if best == highest:
        return best, f"the highest score of the candidates: {scored[best].score:.2f}"
    which = f"the highest, {scored[highest].score:.2f} of epoch {highest}"
    return best, f"the earliest whose score, {scored[best].score:.2f}, is within a standard error of {which}"


def race(files: dict[int, Path], judge: Callable[[Path, Score | None], Score]) -> dict[int, Score]:
    """{epoch: its Score} of those that may be the best: all draw a few portraits, and the others only those that the
    leader doesn't beat by three standard errors: two, were they not those of a few, and it the best of many.

    files: {epoch: its LoRA file}. judge: Evaluation.judge_portraits.
    """
    first = {epoch: judge(file, None) for epoch, file in files.items()}
    leader = max(first.values(), key=lambda some: some.score)
    return {epoch: judge(files[epoch], own) for epoch, own in first.items() if not leader.beats(own, errors=3)}


def _intact_candidates(output: Path, state: TrainingState, log) -> dict[int, Path]:
    """{epoch: folder} of the candidates whose files are as saved; if there are none, of the last epoch, from `last`."""
    intact = {}
    # A former version kept fewer
    for epoch in (e for e in candidate_epochs(state.history) or [state.epoch] if str(e) in state.candidates):
        folder = output / "candidates" / CANDIDATE.format(epoch)
        try:
            read_verified(folder, state.candidates[str(epoch)])
            intact[epoch] = folder
        except (OSError, ValueError) as error:
            log(f"{folder} is damaged ({error}), so this epoch can't be chosen")
    if not intact:
        intact[state.epoch] = output / "candidates" / CANDIDATE.format(state.epoch)
        shutil.copytree(output / "last", intact[state.epoch], dirs_exist_ok=True)
    return intact


def _row(validated: Validated, score: Score | None) -> dict:
    """A candidate as best.json shows it; what is not known is "n/a"."""
    row = {"epoch": validated.epoch, "val_loss": validated.loss, "standard_error": validated.error}
    known = score if score is not None and score.score is not None else None
    row |= {"score": known and known.score, "interval": known and known.interval("points: score")}
    return {name: "n/a" if value is None else value for name, value in row.items()}


def pick_best(run, config, dataset, state: TrainingState, base: Path) -> tuple[dict, list, tuple | None]:
    """Score the candidates, export the best one's files, write best.json; returns scores for the summary, examples(),
    and (Evaluation, the file, its Score) to draw more with, None without pictures.

    The files are what a user loads, and are scored as such. Without pictures the lowest validation loss decides.
    """
    output, candidates = run.output, _intact_candidates(run.output, state, run.log)
    epochs, found = list(candidates), None
    losses = {row.epoch: row.loss for row in state.history if row.epoch in candidates}
    if config.sample_prompts:
        can_score = len(dataset.validation) >= FEWEST
        spread = sorted({epochs[round(x * (len(epochs) - 1) / 3)] for x in range(4)})  # at most four of them
        spread = spread if can_score else epochs[:1]
        what = "Drawing and scoring" if can_score else "Drawing"
        run.log(f"{what} pictures of the base and epoch {', '.join(map(str, spread))}, with the exported files ...")

        def score(is_sparing: bool) -> tuple[Evaluation, dict[int, Score], Score, tuple[int, str]]:
            """The candidates by their portraits, then all pictures of the best one."""
            evaluation = Evaluation(config, dataset, base, run.device, is_sparing=is_sparing)
            files = {epoch: folder / LORA_FILES[-1] for epoch, folder in candidates.items()}
            scored = race({epoch: files[epoch] for epoch in spread}, evaluation.judge_portraits) if can_score else {}
            best, why = choose_best(losses, scored)
            whole = evaluation.judge(files[best], scored.get(best))
            return evaluation, scored, whole, (best, why)

        with run.timing("score"):
            found = sparingly(score, "drawing and scoring", run.device, run.log)
    evaluation, scored, whole, (epoch, reason) = found or (None, {}, None, choose_best(losses, {}))
    if not candidate_epochs(state.history):
        reason = "the last: without held-out faces there is nothing to choose by"
    elif epochs == [state.epoch] == [state.best.epoch]:
        reason = "the lowest validation loss, and the last"
    drawn = examples(evaluation, whole) if evaluation else []
    binary, labelled = ((candidates[epoch] / file).read_bytes() for file in LORA_FILES)
    labelled = with_metadata(labelled, run.labels | {"modelspec.thumbnail": thumbnail(drawn)})  # lora_name may be new
    for file, content in zip(LORA_FILES, (binary, labelled), strict=True):
        write_atomic(output / file, content)
    rows = {row.epoch: _row(row, scored.get(row.epoch)) for row in state.history if row.epoch in candidates}
    best = {"epoch": epoch, "step": epoch * state.steps_per_epoch}
    best |= {name: rows[epoch][name] for name in ("val_loss", "score")}
    best |= {"reason": reason, "candidates": list(rows.values())}
    write_atomic(output / "best.json", json.dumps(best, indent=1).encode())
    rates = [rate for _, rate in Metrics(output).points("lr")]
    facts = facts_of(config, dataset, state, epoch, rates, evaluation, scored | {epoch: whole})
    summary = {"best_epoch": epoch, "best_reason": reason, "verdict": verdict(facts), "still_falling": facts.is_falling}
    summary |= {"score": None, "score_maximum": None, "score_in_words": None}
    if evaluation:
        run.log(evaluation.write(output, whole))
        summary |= {"score": whole.score, "score_maximum": whole.maximum, "score_in_words": str(whole)}
    else:
        for name in ("scores.json", "before_after.png"):  # of an earlier end of this run: not of this LoRA
            (output / name).unlink(missing_ok=True)
    return summary, drawn, (evaluation, output / LORA_FILES[1], whole) if evaluation else None
