"""The end of a run: the best epoch's files, its score, summary.json and the last lines on the screen."""

import json
import math
import time

from evaluation.best_epoch import converged_epoch, pick_best, prune_candidates, save_epoch
from evaluation.report import write_report
from evaluation.share import use_it, write_share
from training.checkpoint import LORA_FILES, TrainingState
from training.files import write_atomic
from training.folder import REPORT
from training.memory import free_memory, peak_memory_mib


def finish(run, config, model, data, state: TrainingState, base) -> dict:
    """Keep the last epoch beside, export the best one, sum up; returns the summary, {} on all but the main process.

    From here on a signal acts at once: all is saved, and the same command finishes.
    """
    run.bar.close()
    with run.signals_act_at_once(even_if_several=True):  # no process waits for another any more
        peak_mib, start = peak_memory_mib(run.device), time.perf_counter()
        if not run.is_main:
            return {}
        prune_candidates(run.output / "candidates", state, config)  # a run that was killed may not have come to it
        save_epoch(run.output / "last", model.unet, run.labels, state)
        model.free()
        free_memory(run.device)
        picked, drawn, evaluated = pick_best(run, config, data.dataset, state, base)
        best_loss = state.best.loss if state.best else None
        summary = picked | {
            "lora_bin": str(run.output / LORA_FILES[0]),
            "lora_safetensors": str(run.output / LORA_FILES[1]),
            "epochs_run": state.epoch,
            "converged_epoch": None if picked["still_falling"] else converged_epoch(state),
            "stopped_epoch": state.epoch if state.epoch < config.num_train_epochs else None,
            "optimizer_steps": state.optimizer_steps,
            "skipped_steps": state.skipped_steps,
            "images_seen": state.images_seen,
            "val_loss_start": state.start_loss,
            "val_loss_best": best_loss,
            "validation": [list(row) for row in state.history],  # epoch, loss, its standard error
            "val_ratio": best_loss / state.start_loss if state.start_loss and best_loss else None,
            "images_per_s": state.images_seen / max(state.train_seconds, 1e-9),
            "peak_memory_mib": peak_mib,
            "peak_memory_in_all_mib": peak_memory_mib(run.device),  # scoring included
            "weight_decay_in_all": math.exp(state.total_log_decay),  # what the weights were multiplied by
            "seconds": (seconds := time.time() - run.started),
            "images_per_s_in_all": (state.images_seen - run.images_before) / seconds,
            "first_step_s": run.first_step_seconds,
            "resumed_from_step": run.resumed_from_step,
        }
        run.spent["export"] = time.perf_counter() - start - run.spent["score"]
        run.spent["start"] = max(0.0, summary["seconds"] - sum(run.spent.values()))
        summary["phases_s"] = {phase: round(seconds, 2) for phase, seconds in run.spent.items()}
        write_share(run, config, drawn, summary)
        use, known = use_it(run, config, base), {"warnings": run.warnings, "history": state.history}
        write_report(run.output, config, run.log, summary["verdict"], use, evaluated, summary=summary, **known)
        write_atomic(run.output / "summary.json", json.dumps(summary, indent=1).encode())
    print_summary(summary, config, state, run)
    run.log(use)
    run.log(f"\n{summary['verdict']}")
    return summary


def print_summary(summary: dict, config, state: TrainingState, run) -> None:
    """The last lines on the screen: what was learnt, and where it is."""
    if summary["stopped_epoch"]:
        run.log(f"Stopped early: no better validation loss in {config.early_stopping_patience} epochs")
    at_best = next(row for row in state.history if row.epoch == summary["best_epoch"])
    is_lowest = state.best is None or at_best == state.best
    lowest, own = ("", "") if is_lowest else (f" after epoch {state.best.epoch}", f"; its loss: {at_best.loss:.4f}")
    if summary["val_ratio"]:
        gained = "still falling" if summary["still_falling"] else "never below the start's: lower learning_rate"
        if converged := summary["converged_epoch"]:
            gained = f"converged after {converged} of {summary['epochs_run']} epochs (95 % of the gain)"
        losses = f"{summary['val_loss_start']:.4f} -> {summary['val_loss_best']:.4f} (x {summary['val_ratio']:.2f})"
        run.log(f"Validation loss {losses}{lowest}; {gained}")
    if summary["score_in_words"]:
        ends = f" (0: as the base, {summary['score_maximum']}: as the artist)" if summary["score_maximum"] else ""
        run.log(f"Score: {summary['score_in_words']}{ends}")
    run.log(f"Best epoch: {summary['best_epoch']} of {summary['epochs_run']}, {summary['best_reason']}{own}")
    first_step = f", first step after {summary['first_step_s']:.0f} s" if summary["first_step_s"] else ""
    whole = f"{summary['images_per_s_in_all']:.1f} with all else"
    speed = f"{summary['images_per_s']:.1f} images/s ({whole}), peak memory {summary['peak_memory_mib']:.0f} MiB"
    run.log(f"{speed}, {summary['seconds']:.0f} s in all{first_step}")
    run.log("Seconds: " + ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in summary["phases_s"].items()))
    run.log(f"Your LoRA: {summary['lora_safetensors']} (the same as .bin beside it)")
    run.log(f"Now look at {run.output / REPORT}")
