"""What an image costs as the data set grows, and what a second process on the same machine brings.

    python bench/bench_scale.py                            100, 1,000 and 10,000 faces, then one process against two
    python bench/bench_scale.py --faces 100,1000
    python bench/bench_scale.py --table                    the results as markdown

The demo's base at its 128 px; the faces are the demo's, each copy with a few pixels and seven captions of its own, so
that none is cached before. Per face: reading (decode, hash, captions, packs of them), encoding (VAE and text encoder,
written to the cache), checking that cache at the next start. Per step of 8: drawing, and the step. What of the data
set lies on the device is one step's, whatever its size; what the process grows by is measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from bench_training import describe_machine, git_commit  # noqa: E402

RESOLUTION = 128  # the demo's
STEPS = 30  # timed, of each data set in turn
CAPTIONS = 7  # of each face


def make_faces(folder: Path, count: int) -> None:
    """`count` different pictures of 128 px with the demo's captions."""
    entries = json.loads((ROOT / "demo" / "faces" / "modified_face_250.json").read_text(encoding="utf-8"))
    pictures = [
        Image.open(ROOT / "demo" / "faces" / f"{entry['image_name']}.png").convert("RGB").resize((RESOLUTION,) * 2)
        for entry in entries
    ]
    random, listed = np.random.default_rng(0), []
    for number in range(count):
        pixels = np.array(pictures[number % len(pictures)])
        pixels[0, :8] = random.integers(256, size=(8, 3))
        Image.fromarray(pixels).save(folder / f"face{number:05d}.png")
        known = entries[number % len(entries)]["captions"]
        captions = [f"{known[caption % len(known)]}, number {number} {caption}" for caption in range(CAPTIONS)]
        listed.append({"image_name": f"face{number:05d}", "captions": captions})
    (folder / "captions.json").write_text(json.dumps(listed), encoding="utf-8")


def measure_data_set(folder: Path, count: int) -> tuple[dict, object]:
    """(seconds per stage, the data set with its latents)."""
    import torch

    from dataset import MangaFaceDataset
    from training.base_model import load_text_encoder, load_tokenizer, load_vae
    from training.encoding import EncodedDataset, encode_faces, encode_texts, folder_identity

    make_faces(folder, count)
    base, cache, seconds, device = ROOT / "demo" / "base", folder / "cache", {}, torch.device("cpu")

    def timed(name: str, act):
        start = time.perf_counter()
        result = act()
        seconds[name] = time.perf_counter() - start
        return result

    vae, text_encoder = load_vae(base, device), load_text_encoder(base, device)
    identity, before = folder_identity(base / "vae"), psutil.Process().memory_info().rss

    def read() -> MangaFaceDataset:
        dataset = MangaFaceDataset(folder, folder / "captions.json", RESOLUTION)
        dataset.make_texts(load_tokenizer(base))
        return dataset

    dataset = timed("read", read)

    def encode() -> EncodedDataset:
        faces = encode_faces(dataset, cache, identity, lambda: vae)
        return EncodedDataset(faces, encode_texts(dataset.texts, cache, identity, lambda: text_encoder), device)

    timed("encode", encode)
    encoded = timed("cached", encode)
    timed("order", lambda: dataset.epoch_order(1))
    disk = sum(file.stat().st_size for file in cache.rglob("*.records"))
    grown = psutil.Process().memory_info().rss - before
    record = {"faces": count, "texts": len(dataset.texts), "seconds": seconds, "disk_bytes": disk, "grown_bytes": grown}
    return record, (dataset, encoded)


def measure_steps(sets: list, records: list[dict]) -> None:
    """Drawing and gradient of a step, the data sets taking turns."""
    import torch

    from train_manga_lora import TrainingConfig
    from training.denoising import accumulate_gradients, draw_batch
    from training.model import build_model

    config = TrainingConfig(lora_rank=16, lora_alpha=32)
    model = build_model(config, ROOT / "demo" / "base", torch.device("cpu"), torch.float32)
    seconds = [([], []) for _ in sets]
    for step in range(STEPS + 3):
        for (dataset, encoded), (drawing, gradient) in zip(sets, seconds, strict=True):
            positions = dataset.epoch_order(0)[8 * (step % 10) : 8 * (step % 10) + 8]
            start = time.perf_counter()
            batch = draw_batch(dataset, positions, 0, step, tuple(encoded.latents[0].shape[1:]), 1000, 0.1)
            drawn = time.perf_counter()
            accumulate_gradients(model.unet, model.scheduler, encoded, batch, torch.arange(8), 8, model.scaler)
            drawing.append(drawn - start)
            gradient.append(time.perf_counter() - drawn)
    for record, (drawing, gradient) in zip(records, seconds, strict=True):
        record["draw_s"], record["step_s"] = statistics.median(drawing[3:]), statistics.median(gradient[3:])


def measure_processes(folder: Path, epochs: int = 3) -> list[dict]:
    """Images per second of the demo's training: one process with one thread, with all, and two of one thread each."""
    rows = []
    for processes, threads in ((1, 1), (1, psutil.cpu_count(logical=True)), (2, 1)):
        output = folder / f"out-{processes}-{threads}"
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command = [
            *(launch if processes > 1 else [sys.executable]),
            str(ROOT / "train_manga_lora.py"),
            "--demo",
            "--output_dir",
            str(output),
            "--cache_dir",
            str(folder / "cache"),
            "--sample_prompts",
            "--num_train_epochs",
            str(epochs),
            "--train_batch_size",
            str(8 // processes),
            "--gradient_accumulation_steps",
            "1",
        ]
        subprocess.run(
            command, check=True, cwd=folder, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
        )
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        rows.append(
            {
                "processes": processes,
                "threads": threads,
                "images_per_s": summary["images_per_s"],
                "val_loss": summary["val_loss_best"],
            }
        )
    return rows


def table(result: dict) -> str:
    """Markdown for docs/results.md."""
    lines = [
        "| faces | texts | read, ms a face | encode, ms a face | check the cache, ms a face | cache | the process "
        "grows by | drawing a step | a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in result["data_sets"]:
        each = {name: 1000 * seconds / record["faces"] for name, seconds in record["seconds"].items()}
        lines.append(
            f"| {record['faces']:,} | {record['texts']:,} | {each['read']:.2f} | {each['encode']:.1f} | "
            f"{each['cached']:.2f} | {record['disk_bytes'] / 2**20:,.0f} MiB | "
            f"{record['grown_bytes'] / 2**20:,.0f} MiB | {1000 * record['draw_s']:.2f} ms | "
            f"{1000 * record['step_s']:.0f} ms |"
        )
    lines += ["", "| processes x threads | images/s | validation loss |", "|---|---|---|"]
    lines += [
        f"| {row['processes']} x {row['threads']} | {row['images_per_s']:.1f} | {row['val_loss']:.6f} |"
        for row in result["processes"]
    ]
    return "\n".join(lines)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", default="100,1000,10000", help="sizes of the data sets [%(default)s]")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "scale" / "demo.json")
    parser.add_argument("--table", action="store_true", help="print the results as markdown, measure nothing")
    args = parser.parse_args(words)
    if args.table:
        print(table(json.loads(args.out.read_text(encoding="utf-8"))))
        return
    if not all(part.isdigit() and int(part) >= 100 for part in args.faces.split(",")):
        parser.exit(2, f"bench_scale.py: --faces {args.faces!r} must be numbers of at least 100, with commas\n")
    records, sets = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for count in map(int, args.faces.split(",")):
            folder = Path(temporary, str(count))
            folder.mkdir()
            record, pair = measure_data_set(folder, count)
            print(json.dumps(record), flush=True)
            records.append(record)
            sets.append(pair)
        measure_steps(sets, records)
        processes = measure_processes(Path(temporary))
    device, _ = describe_machine("cpu")
    command = " ".join(["python bench/bench_scale.py", *words])
    result = {
        "device": device,
        "commit": git_commit(),
        "command": command,
        "data_sets": records,
        "processes": processes,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(result)}\nWritten: {args.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
