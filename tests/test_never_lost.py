"""A run is never lost and a file never trusted: interrupted, killed, damaged, out of space, shared, changed.

    python -m pytest tests/test_never_lost.py             a part of the kills
    python -m pytest tests/test_never_lost.py -m long     the rest of them

Every run is held to one that was never disturbed, in all that it leaves on the disk. Killed runs are forked children
of the test: no interpreter has to start anew.
"""

import builtins
import csv
import dataclasses
import errno
import json
import math
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

import dataset
import train_manga_lora as trainer
from evaluation import best_epoch, pictures, summary
from lora_layers import lora_modules
from training import checkpoint, denoising, encoding, files, memory, model
from training import folder as folder_module

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA can't be forked")
STEPS = 8  # 2 epochs of 4 steps of 2 passes of 2 images
STOPWATCH = {
    "images_per_s",
    "seconds",
    "first_step_s",
    "peak_memory_mib",
    "peak_memory_in_all_mib",
    "train_seconds",
    "resumed_from_step",
}
STOPWATCH |= {"images_per_s_in_all", "phases_s"}
PLACES = {"lora_bin", "lora_safetensors", "output_dir", "cache_dir"}


@pytest.fixture(scope="module", autouse=True)
def two_passes_per_step_and_no_collections():
    with pytest.MonkeyPatch.context() as patch:
        for module in (encoding, pictures, summary):
            patch.setattr(module, "free_memory", lambda device: None)  # a fifth of a second each
        patch.setattr(memory, "choose_plan", lambda plans, _: next(p for p in plans if p.micro_batch == 2))
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_base, shared_faces):
    """The constants of a run of 2 epochs, without pictures. With 4 transformer blocks and small faces: a second."""
    place = tmp_path_factory.mktemp("never_lost")
    base = Path(shutil.copytree(tiny_base, place / "base"))
    shutil.rmtree(base / "unet")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(base / "unet")
    faces = Path(shutil.copytree(shared_faces, place / "faces"))
    for file in faces.glob("*.png"):
        Image.open(file).resize((64, 64)).save(file)
    return trainer.TrainingConfig(
        dataset_dir=str(faces),
        json_file=str(faces / "modified_face_250.json"),
        output_dir=str(place / "undisturbed"),
        pretrained_model=str(base),
        cache_dir=str(place / "cache"),
        resolution=64,
        num_train_epochs=2,
        train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lora_rank=4,
        lora_alpha=8,
        caption_dropout=0.3,
        sample_every_n_epochs=1,
        sample_prompts=(),
        sample_steps=1,
        samples_per_prompt=1,
        num_workers=0,
    )


@pytest.fixture(scope="module")
def undisturbed(plain):
    """(all that such a run leaves, what each of its steps drew)."""
    with pytest.MonkeyPatch.context() as patch:
        drawn = spy_on_draws(patch)
        trainer.main(plain)
    assert len(drawn) == STEPS
    return everything_in(plain.output_dir), drawn


@pytest.fixture(scope="module")
def with_pictures(plain):
    """(constants, all that such a run leaves) with a sheet after each epoch and a score at the end."""
    config = dataclasses.replace(plain, sample_prompts=("a manga face",), output_dir=plain.output_dir + "-pictures")
    trainer.main(config)
    return config, everything_in(config.output_dir)


@pytest.fixture
def config(plain, tmp_path):
    return dataclasses.replace(plain, output_dir=str(tmp_path / "out"))


def spy_on_draws(patch) -> list:
    """What every step draws from now on: (faces, texts, timesteps)."""
    drawn, original = [], trainer.train_step

    def spy(model, encoded, batch, *rest):
        drawn.append((batch.faces.tolist(), batch.texts.tolist(), batch.timesteps.tolist()))
        return original(model, encoded, batch, *rest)

    patch.setattr(trainer, "train_step", spy)
    return drawn


def everything_in(output) -> dict:
    """Relative path -> content of every file of a run, without what a clock or the folder's own name decides.

    Of the checkpoints the newest alone: the one before it tells where the run was interrupted.
    """
    found = {}
    older = [str(path) for path in checkpoint.list_checkpoints(Path(output) / "checkpoints")[:-1]]
    for path in sorted(path for path in Path(output).rglob("*") if path.is_file() and str(path.parent) not in older):
        name = path.relative_to(output).as_posix()
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8") as file:
                content = [{k: v for k, v in row.items() if k not in STOPWATCH} for row in csv.DictReader(file)]
        elif path.suffix == ".json" and path.name != "manifest.json":  # that has the hash of a stopwatch
            content = json.loads(path.read_text(encoding="utf-8"))
            content |= {"constants": {k: v for k, v in content.get("constants", {}).items() if k not in PLACES}}
            content = {k: v for k, v in content.items() if k not in STOPWATCH | PLACES}
        else:  # the report tells the folder's name and the speed, which its tests know
            content = path.read_bytes() if path.name not in ("manifest.json", "report.html") else None
        found[name] = content
    return found


def check_same(output, expected: dict) -> None:
    found = everything_in(output)
    assert found.keys() == expected.keys()  # so nothing half written or put aside is left either
    assert [name for name in found if found[name] != expected[name]] == []


def at_call(patch, module, name: str, call: int, action) -> None:
    """Do `action` when module.name is called for the call-th time (from 1), before it does its work."""
    original, calls = getattr(module, name), []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            action()
        return original(*arguments, **options)

    patch.setattr(module, name, wrapped)


def send(number=signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def interrupted(config, module, name, call, number=signal.SIGTERM) -> str:
    """Run until module.name is called for the call-th time; a signal arrives then. Returns the last line."""
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, module, name, call, lambda: send(number))
        with pytest.raises(files.Interrupted) as stop:
            trainer.main(config)
    assert stop.value.exit_code == 128 + number and "to go on: " in str(stop.value)
    assert not list(Path(config.output_dir).glob(".*"))
    return str(stop.value)


# Interrupted, resumed --------------------------------------------------------------------------------------------

# Where the signal arrives: (what is called, which call of it), and the step after which the run is saved.
POINTS = {
    "in step 1": (trainer, "train_step", 1, 1),
    "between two passes of step 2": (
        denoising,
        "denoising_losses",
        2 + 2 + 4,
        2,
    ),  # 2 are the rehearsal's, 2 the first validation's
    "in mid-epoch": (trainer, "train_step", 3, 3),
    "in an epoch's last step": (trainer, "train_step", 4, 4),
    "in the first of the next": (trainer, "train_step", 5, 5),
    "in the last step": (trainer, "train_step", 8, 8),
}


@pytest.mark.promise("Interrupted and resumed, a run ends with the same files")
@pytest.mark.parametrize("resumes", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("point", POINTS)
def test_an_interrupted_run_draws_the_rest_alone_and_ends_with_the_same_files(
    config, undisturbed, monkeypatch, point, resumes
):
    module, name, call, step = POINTS[point]
    drawn = spy_on_draws(monkeypatch)
    assert f"saved after step {step} of {STEPS}" in interrupted(config, module, name, call)
    if resumes == 2 and step < STEPS:
        step += 1
        assert f"saved after step {step} of" in interrupted(config, trainer, "train_step", 1, signal.SIGINT)
    elif resumes == 2:  # no step is left, but the epoch's end
        assert f"saved after step {step} of" in interrupted(config, trainer, "validate", 1, signal.SIGINT)
    assert len(drawn) == step
    assert trainer.main(config)["resumed_from_step"] == step
    assert drawn == undisturbed[1]
    check_same(config.output_dir, undisturbed[0])


def test_a_resumed_run_that_draws_anew_would_be_noticed(config, undisturbed, monkeypatch):
    """Negative control of the test above."""
    interrupted(config, *POINTS["in mid-epoch"][:3])
    original = trainer.draw_batch
    monkeypatch.setattr(
        trainer, "draw_batch", lambda d, p, seed, step, *rest: original(d, p, seed, max(0, step - 3), *rest)
    )
    trainer.main(config)
    with pytest.raises(AssertionError):
        check_same(config.output_dir, undisturbed[0])
    name = "pytorch_lora_weights.bin"
    assert everything_in(config.output_dir)[name] != undisturbed[0][name]


# Every other phase. Saved: after which step, None if there is nothing yet, or all has been saved before.
PHASES = {
    "reading faces": (dataset, "read_picture", 3, None),
    "encoding faces": (encoding, "encode_image", 3, None),
    "encoding texts": (encoding, "encode_text", 1, None),
    "the first validation": (trainer, "validate", 1, 0),
    "a validation": (denoising, "seeded", 1 + 4 + 4 + 2, 4),  # in its second face
    "keeping a candidate": (best_epoch, "save_epoch", 1, 4),
    "a checkpoint": (checkpoint, "save_checkpoint", 1, 4),  # whole first
    "the last export": (summary, "save_epoch", 1, None),
    "choosing the best": (summary, "pick_best", 1, None),
}


@pytest.mark.promise("Interrupted and resumed, a run ends with the same files")
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_saves_what_can_be_saved(config, undisturbed, tmp_path, phase):
    module, name, call, step = PHASES[phase]
    config = dataclasses.replace(config, cache_dir=str(tmp_path / "cache") if "encod" in phase else config.cache_dir)
    message = interrupted(config, module, name, call)
    assert ("all that was done is kept" in message) if not step else (f"saved after step {step} of" in message)
    summary = trainer.main(config)
    assert summary["resumed_from_step"] == (step or (STEPS if phase in ("the last export", "choosing the best") else 0))
    check_same(config.output_dir, undisturbed[0])


@pytest.mark.promise("Interrupted and resumed, a run ends with the same files")
@pytest.mark.parametrize("call", [2, 4])  # the first epoch's own sheet (the base's is there); among the scored ones
def test_a_signal_while_pictures_are_drawn_acts_at_once_and_they_are_drawn_later(with_pictures, tmp_path, call):
    config = dataclasses.replace(with_pictures[0], output_dir=str(tmp_path / "out"))
    interrupted(config, pictures, "draw_pictures", call)
    trainer.main(config)
    check_same(config.output_dir, with_pictures[1])


# Killed ----------------------------------------------------------------------------------------------------------


def in_a_child(function, seconds: float = 60) -> int:
    """Run it in a forked process. Returns its exit code, negative if a signal ended it."""
    pid = os.fork()
    if not pid:
        try:
            code = 99
            function()
            code = 0
        except trainer.Stop as stop:
            code = stop.exit_code
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return wait_for(pid, seconds)


def wait_for(pid: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail(f"the child was still running after {seconds} s")


def kill_me_at_write(number: int) -> None:
    """Before this process's number-th change to a file system from now on: created, flushed, renamed, deleted."""
    changes, flush = [], os.fsync

    def count(event="os.fsync", arguments=()):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.fsync", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            changes.append(event)
            if len(changes) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda descriptor: count() or flush(descriptor)
    sys.addaudithook(count)


def kill_me_in(seconds: float) -> None:
    threading.Thread(target=lambda: time.sleep(seconds) or os.kill(os.getpid(), signal.SIGKILL), daemon=True).start()


def check_killed(config, expected, module, name, call, kill) -> None:
    """Killed, the same command ends with the same files, and nothing half written is left, in the cache neither."""

    def run():
        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, module, name, call, kill)
            trainer.main(config)
            time.sleep(1)  # a kill after a delay may come just after the end

    assert in_a_child(run) == -signal.SIGKILL
    for path in Path(config.cache_dir).rglob("*.tmp"):
        os.utime(path, (0, 0))  # younger ones could be another machine's
    trainer.main(config)
    check_same(config.output_dir, expected)
    assert not list(Path(config.cache_dir).rglob("*.tmp"))


WRITES_OF_A_SAVE = 26  # the second: with the deletion of the first checkpoint and candidate


@pytest.mark.promise("Killed, the same command ends with the same files")
@pytest.mark.parametrize(
    "write", [pytest.param(n, marks=[] if n == 14 else pytest.mark.long) for n in range(1, WRITES_OF_A_SAVE + 1)]
)
def test_a_run_killed_at_any_write_of_a_checkpoint_loses_nothing(config, one_checkpoint, write):
    config = dataclasses.replace(config, keep_checkpoints=1)
    check_killed(config, one_checkpoint, checkpoint, "save_checkpoint", 2, lambda: kill_me_at_write(write))


@pytest.fixture(scope="module")
def one_checkpoint(plain):
    config = dataclasses.replace(plain, keep_checkpoints=1, output_dir=plain.output_dir + "-one")
    trainer.main(config)
    return everything_in(config.output_dir)


# (what is called, which call of it, the longest delay in seconds); pictures are drawn in "sample"
INSTANTS = {
    "encode": (encoding, "encode_image", 1, 0.2),
    "train": (trainer, "train_step", 5, 0.3),
    "validate": (trainer, "validate", 3, 0.15),
    "sample": (pictures, "draw_pictures", 3, 0.3),
    "save": (checkpoint, "save_checkpoint", 2, 0.01),
    "export": (summary, "save_epoch", 1, 0.02),
}


@pytest.mark.promise("Killed, the same command ends with the same files")
@pytest.mark.parametrize(
    ("phase", "number"),
    [
        pytest.param(phase, n, marks=[] if n == 0 and phase in ("encode", "validate", "sample") else pytest.mark.long)
        for phase in INSTANTS
        for n in range(5)
    ],
)
def test_a_run_killed_at_a_random_instant_loses_nothing(config, undisturbed, with_pictures, tmp_path, phase, number):
    module, name, call, longest = INSTANTS[phase]
    delay = random.Random(f"{phase} {number}").uniform(0, longest)
    expected = undisturbed[0]
    if phase == "encode":
        config = dataclasses.replace(config, cache_dir=str(tmp_path / "cache"))
    if phase == "sample":
        config, expected = dataclasses.replace(with_pictures[0], output_dir=config.output_dir), with_pictures[1]
    check_killed(config, expected, module, name, call, lambda: kill_me_in(delay))


@pytest.mark.promise("Killed, the same command ends with the same files")
@pytest.mark.long
@pytest.mark.parametrize(
    ("since", "write"),
    [
        *(("start_folder", n) for n in [*range(1, 13), *range(16, 120, 4)]),  # about 118 from there to the end
        *(("pick_best", n) for n in range(1, 18)),
        *(("write_share", n) for n in range(1, 21)),
    ],
)
def test_a_run_killed_at_any_write_from_start_to_export_loses_nothing(config, undisturbed, since, write):
    check_killed(
        config,
        undisturbed[0],
        {"start_folder": folder_module}.get(since, summary),
        since,
        1,
        lambda: kill_me_at_write(write),
    )


@pytest.mark.promise("Killed, the same command ends with the same files")
@pytest.mark.parametrize(
    "write", [pytest.param(n, marks=[] if n == 4 else pytest.mark.long) for n in (1, 2, 4, 7, 10, 13, 16, 19, 22)]
)
def test_a_run_killed_while_it_overwrites_another_is_started_by_the_same_command(
    config, undisturbed, two_checkpoints, write
):
    shutil.copytree(two_checkpoints[1], config.output_dir)
    config = dataclasses.replace(config, overwrite=True)
    expected = undisturbed[0] | {
        "config.json": undisturbed[0]["config.json"]
        | {"constants": undisturbed[0]["config.json"]["constants"] | {"overwrite": True}}
    }
    check_killed(config, expected, folder_module, "start_folder", 1, lambda: kill_me_at_write(write))


@pytest.mark.promise("Killed, the same command ends with the same files")
def test_a_run_interrupted_in_validation_then_killed_counts_its_last_step_once(config, undisturbed):
    """Its row is in metrics.csv already, but not in the checkpoint, which is from before the validation."""
    interrupted(config, trainer, "validate", 2)
    check_killed(config, undisturbed[0], checkpoint, "save_checkpoint", 1, lambda: kill_me_at_write(1))


def test_a_second_signal_ends_the_run_at_once_and_still_nothing_is_lost(config, undisturbed):
    def twice():
        send()
        time.sleep(1.1)
        send()
        time.sleep(60)

    def run():
        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, trainer, "train_step", 6, twice)
            trainer.main(config)

    assert in_a_child(run, seconds=30) == 143
    assert trainer.main(config)["resumed_from_step"] == 4
    check_same(config.output_dir, undisturbed[0])


# On the command line ---------------------------------------------------------------------------------------------


def flags(config) -> list[str]:
    words = [trainer.__file__]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            words += [f"--{field.name}", *(value if isinstance(value, tuple) else [str(value)])]
    return words


def last_line(log: Path) -> str:
    return re.search("train_manga_lora.py: .*", log.read_text())[0]  # it may follow an unfinished bar


def on_the_command_line(words: list[str], log: Path, before=lambda: None) -> int:
    """python train_manga_lora.py ... in a child; what it prints goes to `log`."""

    def run():
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        sys.argv = words
        before()
        runpy.run_path(str(Path(trainer.__file__)), run_name="__main__")

    return in_a_child(run)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_run_prints_the_very_command_that_goes_on(config, tmp_path, overwrite):
    if overwrite:
        (Path(config.output_dir) / "checkpoints" / "step-000099").mkdir(parents=True)
        (Path(config.output_dir) / "config.json").write_text('{"constants": {}}')
    words = [*flags(config), *["--overwrite"] * overwrite]
    code = on_the_command_line(
        words,
        tmp_path / "log",
        lambda: at_call(pytest.MonkeyPatch(), denoising, "draw_batch", 1 + 3, lambda: send(signal.SIGINT)),
    )
    last = last_line(tmp_path / "log")
    assert code == 130 and "saved after step 3 of 8" in last
    command = shlex.split(last.split("to go on: ")[1])
    assert command == ["python", *flags(config)]
    assert on_the_command_line(command[1:], tmp_path / "log") == 0
    assert "Resuming after step 3 of 8" in (tmp_path / "log").read_text()


def test_before_an_overwrite_has_happened_the_command_printed_still_asks_for_it(config, tmp_path):
    words = [*flags(dataclasses.replace(config, cache_dir=str(tmp_path / "cache"))), "--overwrite"]
    code = on_the_command_line(
        words, tmp_path / "log", lambda: at_call(pytest.MonkeyPatch(), encoding, "encode_image", 2, send)
    )
    last = last_line(tmp_path / "log")
    assert code == 143 and last.endswith(shlex.join(["python", *words]))


# Damaged ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(plain):
    """A run interrupted after step 6: (its constants, its folder, with checkpoints 4 and 6). To be copied."""
    config = dataclasses.replace(plain, output_dir=plain.output_dir + "-two")
    interrupted(config, trainer, "train_step", 6)
    folder = Path(config.output_dir)
    assert [path.name for path in checkpoint.list_checkpoints(folder / "checkpoints")] == ["step-000004", "step-000006"]
    return config, folder


def damages(size: int) -> dict:
    """What may have become of a file of this size: bytes -> bytes, or None if it is deleted."""

    def flipped(place):
        return lambda content: content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    def cut(length):
        return lambda content: content[:length]

    cuts = {f"cut to {length}": cut(length) for length in (0, 1, size // 2, size - 1)}
    flips = {f"bit in byte {place}": flipped(place) for place in {round(x * (size - 1) / 15) for x in range(16)}}
    return {"deleted": None} | cuts | flips


@pytest.mark.promise("A damaged checkpoint is put aside for the one before")
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_put_aside_and_the_one_before_is_used(
    two_checkpoints, tmp_path, record_property, name
):
    state = json.loads((two_checkpoints[1] / "checkpoints/step-000006/state.json").read_text())
    size = (two_checkpoints[1] / "checkpoints/step-000006" / name).stat().st_size
    for number, (what, damage) in enumerate(damages(size).items()):
        folder = Path(shutil.copytree(two_checkpoints[1] / "checkpoints", tmp_path / str(number)))
        newest = folder / "step-000006"
        if damage is None:
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(damage((newest / name).read_bytes()))
        _, loaded, problems = checkpoint.load_newest_checkpoint(folder, state["fingerprint"])
        assert loaded["step"] == 4, what
        assert len(problems) == 1 and "\n" not in problems[0] and f"{newest} is damaged" in problems[0], what
        assert (folder / "step-000006.corrupt").is_dir() and not newest.exists(), what
    record_property("cases", number + 1)


def rewrite(folder: Path, tensors=None, **changes) -> None:
    """Another content, with a manifest that fits."""
    state = json.loads((folder / "state.json").read_text()) | changes
    (folder / "state.json").write_text(json.dumps(state))
    save_file(tensors or load_file(folder / "state.safetensors"), folder / "state.safetensors")
    names = ("state.json", "state.safetensors")
    manifest = {name: files.describe((folder / name).read_bytes()) for name in names}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.promise("A damaged checkpoint is put aside for the one before")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_checkpoint_with_numbers_that_are_not_finite_is_put_aside(two_checkpoints, tmp_path, value):
    folder = Path(shutil.copytree(two_checkpoints[1] / "checkpoints", tmp_path / "copy"))
    tensors = load_file(folder / "step-000006" / "state.safetensors")
    tensors["optimizer.exp_avg"][7] = value
    rewrite(folder / "step-000006", {name: tensor.clone() for name, tensor in tensors.items()})
    _, state, problems = checkpoint.load_newest_checkpoint(folder)
    assert state["step"] == 4 and "not finite" in problems[0]


@pytest.mark.promise("A damaged checkpoint is put aside for the one before")
@pytest.mark.parametrize("what", ["another run's", "one byte of the weights", "no manifest"])
def test_a_bad_newest_checkpoint_makes_a_run_go_on_from_the_one_before(
    two_checkpoints, config, undisturbed, plain, what, capsys
):
    shutil.copytree(two_checkpoints[1], config.output_dir)
    newest = Path(config.output_dir) / "checkpoints" / "step-000006"
    if what == "another run's":
        other = dataclasses.replace(config, seed=1, output_dir=config.output_dir + "-other")
        interrupted(other, trainer, "train_step", 6)
        shutil.rmtree(newest)
        shutil.copytree(Path(other.output_dir) / "checkpoints" / "step-000006", newest)
    elif what == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        content = bytearray((newest / "state.safetensors").read_bytes())
        content[-100] ^= 1
        (newest / "state.safetensors").write_bytes(content)
    assert trainer.main(config)["resumed_from_step"] == 4
    told = [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line]
    assert len(told) == 1 and "moved to step-000006.corrupt" in told[0]
    shutil.rmtree(newest.with_name("step-000006.corrupt"))
    check_same(config.output_dir, undisturbed[0])


@pytest.mark.parametrize("lost", ["summary.json", "pytorch_lora_weights.bin", "a byte of summary.json"])
def test_a_finished_folder_that_lost_a_file_gets_it_again(undisturbed, plain, config, lost):
    shutil.copytree(plain.output_dir, config.output_dir)
    if lost.startswith("a byte"):
        Path(config.output_dir, "summary.json").write_text("{")
    else:
        Path(config.output_dir, lost).unlink()
    assert trainer.main(config)["resumed_from_step"] == 8
    check_same(config.output_dir, undisturbed[0])


@pytest.mark.parametrize("junk", [b"\xff\xfe", "1,\u00b2,1,1,1,,1,1,1".encode(), b'"' + b"x" * 200_000])
def test_what_another_program_wrote_into_metrics_csv_is_dropped_and_the_run_goes_on(
    two_checkpoints, config, undisturbed, junk
):
    shutil.copytree(two_checkpoints[1], config.output_dir)
    with open(Path(config.output_dir, "metrics.csv"), "ab") as file:
        file.write(junk + b"\n")
    assert trainer.main(config)["resumed_from_step"] == 6
    check_same(config.output_dir, undisturbed[0])


def test_a_disk_that_fails_for_a_moment_is_not_taken_for_a_damaged_checkpoint(two_checkpoints, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    shutil.copytree(Path(two_checkpoints[1], "checkpoints"), folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", mock.Mock(side_effect=OSError(errno.EIO, "I/O error", "state.json")))
        with pytest.raises(OSError, match="I/O error"):
            checkpoint.load_newest_checkpoint(folder)
    assert not list(folder.glob("*.corrupt")) and checkpoint.load_newest_checkpoint(folder)[1]["step"] == 6


@pytest.mark.promise("A damaged checkpoint is put aside for the one before")
def test_a_run_whose_checkpoints_are_all_bad_stops_every_time_it_is_started(two_checkpoints, config):
    shutil.copytree(two_checkpoints[1], config.output_dir)
    for state in Path(config.output_dir).glob("checkpoints/*/state.json"):
        state.write_text("{")
    for words in ("step-000006 is damaged", "only damaged ones: step-000004.corrupt, step-000006.corrupt"):
        with pytest.raises(checkpoint.CheckpointError, match=f"{words}.*--overwrite starts anew"):
            trainer.main(config)
    assert len(list(Path(config.output_dir).glob("checkpoints/*.corrupt/*"))) == 6  # nothing was deleted


@pytest.mark.promise("A damaged checkpoint is put aside for the one before")
@pytest.mark.parametrize("lost", [1, 2])
def test_a_damaged_candidate_is_named_and_never_exported(two_checkpoints, config, capsys, monkeypatch, lost):
    """The lower loss is epoch 1's, whose files are damaged; then both epochs' are."""
    shutil.copytree(two_checkpoints[1], config.output_dir)
    candidates = Path(config.output_dir) / "candidates"
    monkeypatch.setattr(best_epoch, "candidate_epochs", lambda history: [e.epoch for e in history if e.epoch])
    monkeypatch.setattr(best_epoch, "choose_best", lambda losses, scored: (next(iter(losses)), "it is the first"))
    with monkeypatch.context() as patch:

        def damage():
            for file in sorted(candidates.glob("*/pytorch_lora_weights.bin"))[:lost]:
                file.write_bytes(file.read_bytes()[:-1])

        at_call(patch, summary, "pick_best", 1, damage)
        best = trainer.main(config)["best_epoch"]
    assert capsys.readouterr().out.count("is damaged (pytorch_lora_weights.bin is not what was saved)") == lost
    assert best == 2
    exported = Path(config.output_dir, "pytorch_lora_weights.bin").read_bytes()
    assert exported == Path(config.output_dir, "last", "pytorch_lora_weights.bin").read_bytes()


def test_epochs_that_a_former_version_did_not_keep_are_not_called_damaged(config, capsys, monkeypatch):
    """The candidates of its rule were fewer; so a run that goes on asks for some that never were."""
    keep = trainer.keep_candidate
    kept = {1: lambda *_: None, 2: keep}
    monkeypatch.setattr(trainer, "keep_candidate", lambda *of: kept[of[3].epoch](*of))
    config = dataclasses.replace(config, num_train_epochs=2, early_stopping_patience=0)
    monkeypatch.setattr(best_epoch, "candidate_epochs", lambda history: [1, 2])
    assert trainer.main(config)["best_epoch"] == 2
    assert "damaged" not in capsys.readouterr().out


# Half written ----------------------------------------------------------------------------------------------------


def test_what_killed_processes_left_is_cleaned_up_and_never_taken_for_a_checkpoint(
    two_checkpoints, config, undisturbed, tmp_path
):
    shutil.copytree(two_checkpoints[1], config.output_dir)
    output = Path(config.output_dir)
    dead = in_a_child_that_ended()
    shutil.copytree(output / "checkpoints/step-000004", output / f"checkpoints/.step-000007.{dead}.tmp")
    for name in (".summary.json", "samples/.epoch-001.png", "candidates/epoch-001/.pytorch_lora_weights.bin"):
        (output / f"{name}.{dead}.tmp").write_bytes(b"half")
    (output / ".lock").touch()
    mine = output / ".notes.tmp"
    mine.write_bytes(b"half")
    assert trainer.main(config)["resumed_from_step"] == 6
    mine.unlink()  # and not before
    check_same(output, undisturbed[0])


def in_a_child_that_ended() -> int:
    """The number of a process that is no more."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_a_step_saved_again_is_never_absent(tmp_path, monkeypatch):
    """As an epoch's last is, interrupted before the epoch's end and then with it. One checkpoint is kept."""
    checkpoint.save_checkpoint(tmp_path, 5, {"lora": torch.ones(3)}, {"epochs": 0}, keep=1)
    seen, original = [], os.replace

    def watched(*arguments):
        original(*arguments)
        _, state, problems = checkpoint.load_newest_checkpoint(tmp_path)
        seen.append((state["epochs"], problems))

    monkeypatch.setattr(os, "replace", watched)
    checkpoint.save_checkpoint(tmp_path, 5, {"lora": torch.ones(3)}, {"epochs": 1}, keep=1)
    assert seen == [(0, [])] * 4 + [(1, [])] * 2  # three files, aside, into its place, discarded
    assert os.listdir(tmp_path) == ["step-000005"]


# Numbers ---------------------------------------------------------------------------------------------------------


def poison(what: str, value: float):
    """(module, function) to wrap, and what to do with its result or arguments, so that `value` turns up in `what`."""

    def poisoned_gradient(result, unet, *_):
        set_one(next(iter(lora_modules(unet).values())).up_weight.grad, value)
        return result

    def poisoned_weight(result, _, __, weights, *___):
        set_one(weights.data, value)
        return result

    if what == "loss":
        return denoising, "denoising_losses", lambda result, *_: result * (value if torch.is_grad_enabled() else 1)
    if what == "gradient":
        return model, "accumulate_gradients", poisoned_gradient
    return trainer, "clip_and_step", poisoned_weight


def set_one(tensor: torch.Tensor, value: float) -> None:
    tensor.view(-1)[3] = value


@pytest.mark.promise("Numbers that are not finite stop the run and are never exported")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("what", "step"), [("loss", 6), ("gradient", 6), ("weight", 6), ("weight", 8)])
def test_a_number_that_is_not_finite_stops_the_run_and_the_checkpoint_stands(
    config, two_checkpoints, monkeypatch, what, step, value
):
    shutil.copytree(two_checkpoints[1], config.output_dir)
    shutil.rmtree(Path(config.output_dir) / "checkpoints" / "step-000006")
    module, name, change = poison(what, value)
    original, now = getattr(module, name), []
    at_call(
        monkeypatch,
        trainer,
        "draw_batch",
        1 + step - 4,  # the first is the rehearsal's
        lambda: now.append(1),
    )
    monkeypatch.setattr(module, name, lambda *a: change(original(*a), *a) if now else original(*a))
    with pytest.raises(trainer.Stop, match="checkpoint stands") as stop:
        trainer.main(config)
    assert stop.value.exit_code == 4
    if (what, step) != ("weight", 8):
        assert re.search(r"step [67]: .*\(images image\d+, image\d+.*lower learning_rate", str(stop.value))
    assert not list(Path(config.output_dir).glob("pytorch_lora*")) and not (Path(config.output_dir) / "last").exists()
    monkeypatch.undo()
    _, state, problems = checkpoint.load_newest_checkpoint(Path(config.output_dir) / "checkpoints")
    assert state["step"] == 4 and not problems


def test_weights_that_are_not_finite_are_not_saved_when_a_signal_comes(config, two_checkpoints, monkeypatch):
    shutil.copytree(two_checkpoints[1], config.output_dir)
    original = trainer.clip_and_step
    monkeypatch.setattr(
        trainer, "clip_and_step", lambda o, s, w, n: (original(o, s, w, n), set_one(w.data, math.nan))[0]
    )
    at_call(monkeypatch, trainer, "train_step", 1, send)
    with pytest.raises(trainer.Stop, match="the weights are not finite") as stop:
        trainer.main(config)
    assert stop.value.exit_code == 4
    assert len(checkpoint.list_checkpoints(Path(config.output_dir) / "checkpoints")) == 2


# Space -----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("Without space nothing is lost")
def test_a_disk_that_is_too_small_is_told_before_step_1_and_nothing_is_written(config, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**24))
    monkeypatch.setattr(trainer, "train_step", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(trainer.Stop, match=r"may take 6\d MiB more .*16 MiB free.*choose another output_dir") as stop:
        trainer.main(config)
    assert stop.value.exit_code == 3 and str(config.output_dir) in str(stop.value)
    assert not os.path.exists(config.output_dir)


def test_the_space_asked_for_is_what_a_run_takes_and_not_twice_that(tmp_path, monkeypatch):
    """Of SD1.5's size it is checkpoints and LoRA files; what is there already isn't asked for again."""
    asked = []
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "manga_faces.safetensors").write_bytes(bytes(2**22))
    for output, free, every in ((Path("nowhere"), 0, 1), (tmp_path, 0, 1), (Path("nowhere"), 0, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(0, 0, free))
        with pytest.raises(trainer.Stop) as stop:
            config = trainer.TrainingConfig(num_train_epochs=30, keep_checkpoints=2, save_every_n_epochs=every)
            folder_module.check_space(output, 3_188_736, config)
        asked.append(int(re.search(r"may take (\d+) MiB", str(stop.value))[1]))
    checkpoints, files = 3 * 3 * 4 * 3.188736e6, 2 * 2 * 3.188736e6
    assert asked[0] == round((checkpoints + 18 * files) / 2**20 + 64)  # 8 epochs, the newest, 6 with a sheet, 3 more
    assert asked[1] == asked[0] - 4
    assert asked[2] == round((checkpoints + 33 * files) / 2**20 + 64)


@pytest.mark.promise("Without space nothing is lost")
def test_a_disk_that_fills_up_at_any_write_of_a_save_keeps_the_last_good_checkpoint(
    two_checkpoints, tmp_path, record_property
):
    folder = Path(shutil.copytree(two_checkpoints[1] / "checkpoints", tmp_path / "copy"))
    tensors, state, _ = checkpoint.load_newest_checkpoint(folder)
    before = everything_in(folder)
    cases = 0
    for name in ("open", "fsync", "replace", "mkdir"):
        for call in range(1, 9):
            with pytest.MonkeyPatch.context() as patch:
                where = {"open": builtins, "mkdir": Path}.get(name, os)
                at_call(patch, where, name, call, no_space)
                try:
                    checkpoint.save_checkpoint(folder, 7, tensors, state, keep=2)
                except OSError:
                    cases += 1
                else:
                    break
            assert everything_in(folder) == before, (name, call)
        shutil.rmtree(folder / "step-000007")
        shutil.copytree(two_checkpoints[1] / "checkpoints" / "step-000004", folder / "step-000004", dirs_exist_ok=True)
    assert cases >= 3 + 3 + 4 + 1  # three files and the folder
    record_property("cases", cases)


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.promise("Without space nothing is lost")
def test_a_disk_that_fills_up_ends_the_run_with_code_3_and_the_command_goes_on(config, undisturbed, tmp_path):
    def limit():  # the system itself refuses larger files
        soft = 25_000
        at_call(
            pytest.MonkeyPatch(),
            files,
            "describe",
            3,
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY)),
        )

    assert on_the_command_line(flags(config), tmp_path / "log", limit) == 3
    last = last_line(tmp_path / "log")
    assert "File too large" in last and "what was saved is intact" in last and "run the same command again" in last
    assert trainer.main(config)["resumed_from_step"] == 4
    check_same(config.output_dir, undisturbed[0])


# Shared ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("Two runs never share a folder")
def test_a_second_run_in_the_folder_refuses_until_the_first_is_dead(config, undisturbed, tmp_path):
    def run():
        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, trainer, "train_step", 6, lambda: (tmp_path / "here").touch() or time.sleep(60))
            trainer.main(config)

    pid = os.fork()
    if not pid:
        try:
            run()
        finally:
            os._exit(1)
    try:
        while not (tmp_path / "here").exists():
            time.sleep(0.02)
        before = everything_in(config.output_dir)
        for overwrite in (False, True):
            with pytest.raises(checkpoint.CheckpointError, match="is in use by another run: wait for it"):
                trainer.main(dataclasses.replace(config, overwrite=overwrite))
        assert everything_in(config.output_dir) == before
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert trainer.main(config)["resumed_from_step"] == 4
    check_same(config.output_dir, undisturbed[0])


@pytest.mark.promise("Two runs never share a folder")
def test_of_runs_that_start_at_the_same_instant_exactly_one_goes_on(tmp_path):
    for attempt in range(20):
        folder, pids = tmp_path / str(attempt) / "out", []
        start = time.time() + 0.05
        for _ in range(3):
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    while time.time() < start:
                        pass
                    lock = folder_module.locked(folder)
                    lock.__enter__()
                    code = 0
                finally:
                    (tmp_path / f"{os.getpid()}@{attempt}").touch()
                    while len(list(tmp_path.glob(f"*@{attempt}"))) < 3:  # all have tried while all are alive
                        time.sleep(0.01)
                    os._exit(code)
            pids.append(pid)
        assert [wait_for(pid, 10) for pid in pids].count(0) == 1


def test_a_disk_without_locks_is_named_and_nothing_is_left_on_it(tmp_path, monkeypatch):
    def unsupported(*_, **__):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(folder_module.FileLock, "acquire", unsupported)
    with pytest.raises(checkpoint.CheckpointError, match=r"can't be locked .*: choose one on a local disk"):
        folder_module.locked(tmp_path / "a" / "b").__enter__()
    assert not list(tmp_path.iterdir())


def test_a_folder_made_for_a_run_that_wrote_nothing_goes_with_its_lock(tmp_path):
    with folder_module.locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert not list(tmp_path.iterdir())
    with folder_module.locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]


def test_a_finished_run_and_a_dry_run_need_no_lock(plain, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "locked", lambda *_: pytest.fail("the folder was locked"))
    trainer.main(plain)
    trainer.main(dataclasses.replace(plain, output_dir=str(tmp_path / "out"), dry_run=True))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "dataset.html"]


# Changed mind ----------------------------------------------------------------------------------------------------

MAY_CHANGE = {  # as README.md says
    "output_dir",
    "num_train_epochs",
    "early_stopping_patience",
    "sample_prompts",
    "samples_per_prompt",
    "sample_every_n_epochs",
    "sample_steps",
    "guidance_scale",
    "save_every_n_epochs",
    "keep_checkpoints",
    "num_workers",
    "cache_dir",
    "dry_run",
    "overwrite",
    "lora_name",
    "private_captions",
}


def another(value):
    """Of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, "another face")
    return value + "x" if isinstance(value, str) else value + 1


@pytest.mark.promise("What may change on resume may, all else is refused by name")
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(trainer.TrainingConfig)])
def test_each_constant_is_allowed_to_change_or_refused_by_its_name(two_checkpoints, name):
    config, folder = two_checkpoints
    run = json.loads((folder / "config.json").read_text())
    value = another(getattr(config, name))
    run["constants"] |= {name: value}
    ask = lambda: folder_module.check_output_folder(folder, run, trainer.MAY_CHANGE_ON_RESUME, False, {})  # noqa: E731
    if name in MAY_CHANGE:
        assert ask() == "resume"
    else:
        was = re.escape(repr(json.loads(json.dumps(getattr(config, name)))))
        with pytest.raises(checkpoint.CheckpointError, match=f"{name} was {was}, is {re.escape(repr(value))}") as error:
            ask()
        assert "--overwrite" in str(error.value) and str(error.value).count(" was ") == 1


@pytest.mark.promise("What may change on resume may, all else is refused by name")
@pytest.mark.parametrize("name", sorted(trainer.FORMER.keys() - MAY_CHANGE))
def test_a_constant_that_a_former_version_lacked_counts_as_it_behaved(two_checkpoints, tmp_path, name):
    former = json.loads((two_checkpoints[1] / "config.json").read_text())
    now = json.loads(json.dumps(former))
    now["constants"] |= trainer.FORMER
    former["constants"] = {key: value for key, value in former["constants"].items() if key not in trainer.FORMER}
    folder = tmp_path / "former"
    shutil.copytree(two_checkpoints[1], folder)
    (folder / "config.json").write_text(json.dumps(former))
    rules = (trainer.MAY_CHANGE_ON_RESUME, False, trainer.FORMER)
    assert folder_module.check_output_folder(folder, now, *rules) == "resume"
    now["constants"][name] = another(trainer.FORMER[name])
    with pytest.raises(checkpoint.CheckpointError, match=f"{name} was {trainer.FORMER[name]!r}, is"):
        folder_module.check_output_folder(folder, now, *rules)


@pytest.mark.promise("What may change on resume may, all else is refused by name")
@pytest.mark.parametrize("name", ["data", "processes", "precision"])
def test_another_data_set_and_other_hardware_are_refused_by_name(two_checkpoints, name):
    run = json.loads((two_checkpoints[1] / "config.json").read_text())
    with pytest.raises(checkpoint.CheckpointError, match="faces in another" if name == "data" else f"{name} was "):
        folder_module.check_output_folder(
            two_checkpoints[1], run | {name: "other"}, trainer.MAY_CHANGE_ON_RESUME, False, {}
        )


@pytest.mark.promise("What may change on resume may, all else is refused by name")
def test_all_that_may_change_without_changing_the_weights_changes_none(two_checkpoints, undisturbed, config, tmp_path):
    shutil.copytree(two_checkpoints[1], config.output_dir)
    trainer.main(
        dataclasses.replace(
            config,
            early_stopping_patience=3,
            samples_per_prompt=2,
            sample_every_n_epochs=0,
            sample_steps=3,
            guidance_scale=3.0,
            save_every_n_epochs=0,
            keep_checkpoints=5,
            num_workers=1,
            cache_dir=str(tmp_path / "c"),
        )
    )
    found = everything_in(config.output_dir)
    for name in found.keys() & undisturbed[0].keys() - {"config.json"}:
        expected = undisturbed[0][name]
        if name == "share/README.md":  # it says at which guidance to draw
            assert b"pipe('a manga face')" in expected
            expected = expected.replace(b"pipe('a manga face')", b"pipe('a manga face', guidance_scale=3)")
        assert found[name] == expected, name
