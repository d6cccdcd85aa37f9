"""Why does the demo's LoRA not learn glasses and flowers, which its base has never seen?

    python bench/new_concepts.py            8 rows, 2 seeds: half an hour of two cores; goes on where it stopped
    python bench/new_concepts.py --table    the committed results as markdown

Rows of bench/ablation.py are trained for as long as the demo. With each LoRA pictures are drawn for the captions of
training faces that have the word, and for those of others into which it was put; the judge of attributes says how many
show it. And what only joined captions cost: the loss on held-out faces with captions joined, and with each one alone.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import ablation
from ablation import NEW, RESULT, SAMPLE_STEPS, WORK, settings_of, start_worker, write_results

OUT = RESULT.parent / "new_concepts.json"
ROWS = {  # of bench/ablation.py, and what they do
    "baseline": "nothing",
    "joined_captions": "joined captions only",
    "glasses_half": "every second face drawn has glasses",
    "joined_glasses_half": "joined captions only, every second face drawn has glasses",
    "flowers_half": "every second face drawn has flowers",
    "joined_flowers_half": "joined captions only, every second face drawn has flowers",
    "more_glasses": "100 more faces with glasses",
    "joined_more_glasses": "joined captions only, 100 more faces with glasses",
}
MORE = {"more_glasses": "baseline", "joined_more_glasses": "joined_captions"}  # the row that is trained on more faces
SEEDS = 2
PICTURES = 24  # of each kind of text
MORE_FACES, FIRST_MORE = 100, 3000  # with glasses; their numbers, in no other set, begin there
PHRASES = {"glasses": ("round glasses", "square glasses", "oval glasses"), "flowers": ("flowers in the hair",)}
KINDS = {"own": "own captions", "put in": "others, with it", "others": "others"}
LOSSES = {"joined": "loss, captions joined", "alone": "loss, one caption alone"}


def texts_of(word: str, dataset) -> dict[str, list[str]]:
    """PICTURES texts of each kind, all joined captions of training faces."""
    training = [dataset.faces[face].captions for face in dataset.train]
    own = [", ".join(captions) for captions in training if word in " ".join(captions)]
    others = [captions for captions in training if word not in " ".join(captions)]
    others = others[:: len(others) // PICTURES][:PICTURES]
    phrases = [PHRASES[word][turn % len(PHRASES[word])] for turn in range(PICTURES)]
    put_in = [", ".join((*some[:2], phrase, *some[2:])) for some, phrase in zip(others, phrases, strict=True)]
    return {"own": (own * PICTURES)[:PICTURES], "put in": put_in, "others": [", ".join(some) for some in others]}


def with_more_glasses(folder: Path) -> dict[str, str]:
    """Constants for a data set, made in `folder`, of the demo's faces and more with glasses, by the same artist."""
    sys.path.insert(0, str(ablation.ROOT / "demo"))
    import draw_faces

    shutil.copytree(ablation.ROOT / "demo" / "faces", folder, dirs_exist_ok=True)
    file = folder / "modified_face_250.json"
    entries = json.loads(file.read_text(encoding="utf-8"))
    drawn = map(draw_faces.manga_face, itertools.count(FIRST_MORE))
    with_glasses = ((picture, captions) for picture, captions, _ in drawn if "glasses" in " ".join(captions))
    for number, (picture, captions) in enumerate(itertools.islice(with_glasses, MORE_FACES)):
        picture.save(folder / f"more{number:03d}.png")
        entries.append({"image_name": f"more{number:03d}", "captions": captions})
    file.write_text(json.dumps(entries), encoding="utf-8")
    return {"dataset_dir": str(folder), "json_file": str(file)}


def measure(words: tuple[str, ...], lora: Path) -> dict[str, float]:
    """Of this LoRA the share of pictures that show each word, by kind of text ("glasses: own"); and the LOSSES."""
    import torch

    import train_manga_lora
    from dataset import MangaFaceDataset
    from evaluation import pictures
    from training.base_model import load_text_encoder, load_unet, load_vae
    from training.bases import resolution_unit

    constants = train_manga_lora.DEMO | {"demo": True, "sample_steps": SAMPLE_STEPS}
    config, device = train_manga_lora.TrainingConfig(**constants), torch.device("cpu")
    base = Path(config.pretrained_model)
    dataset = MangaFaceDataset.from_config(config, resolution_unit(base))
    unet, scheduler = load_unet(base, device, torch.float32)
    pipe = pictures.build_pipeline(load_vae(base, device), unet, scheduler, *load_text_encoder(base, device))
    pipe.load_lora_weights(lora)
    found = {f"{word}: {kind}": share for word in words for kind, share in shown(word, dataset, config, pipe).items()}
    return found | losses(dataset, pipe)


def shown(word: str, dataset, config, pipe) -> dict[str, float]:
    """The share of pictures that show the word, by kind of text."""
    import torch

    from evaluation import measures, pictures

    network, shape = measures.load_attribute_network()[0], (config.resolution, config.resolution)
    shares = {}
    for kind, texts in texts_of(word, dataset).items():
        drawn = pictures.draw_pictures(pipe, {"prompt": texts}, [*range(PICTURES)], [shape] * PICTURES, config)
        small = torch.from_numpy(measures.squashed(drawn, measures.ATTRIBUTE_PIXELS)).permute(0, 3, 1, 2)
        with torch.no_grad():
            seen = network(small / 127.5 - 1)[:, measures.ATTRIBUTES.index(word)] > 0
        shares[kind] = seen.float().mean().item()
    return shares


def losses(dataset, pipe) -> dict[str, float]:
    """Mean squared errors of the predicted noise on held-out faces, at 4 timesteps, the same noises for both LOSSES."""
    import torch
    from diffusers import DDPMScheduler

    noising = DDPMScheduler.from_config(pipe.scheduler.config)
    captions = [dataset.faces[face].captions for face in dataset.validation]
    texts = {"joined": [[", ".join(some)] * len(some) for some in captions], "alone": captions}
    found = {}
    with torch.no_grad():
        pixels = torch.stack([dataset.pixels(face) for face in dataset.validation])
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        for kind, of_faces in texts.items():
            errors, generator = [], torch.Generator().manual_seed(0)
            for turn, timestep in itertools.product(range(min(map(len, captions))), (125, 375, 625, 875)):
                own = [of_face[turn] for of_face in of_faces]
                ids = pipe.tokenizer(own, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
                steps = torch.full((len(own),), timestep)
                noise = torch.randn(latents.shape, generator=generator)
                noisy = noising.add_noise(latents, noise, steps)
                predicted = pipe.unet(noisy, steps, pipe.text_encoder(ids.input_ids)[0]).sample
                errors.append((predicted - noise).square().mean().item())
            found[kind] = statistics.fmean(errors)
    return found


def run(job: tuple[str, int, dict]) -> dict:
    """Train one row from one seed and measure; a training that was interrupted goes on."""
    from bench_training import git_commit

    row, seed, settings = job
    folder = WORK / "new_concepts" / f"{row}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        constants, rate = with_more_glasses(folder / "faces") if row in MORE else {}, settings["learning_rate"]
        own = MORE.get(row, row)
        summary = ablation.train(own, seed, settings["epochs"], rate, folder / "run", **constants)
        words = tuple(word for word in NEW if word in row) or NEW
        found = measure(words, Path(summary["lora_safetensors"]))
    if row in MORE:  # which holds out other faces
        found = {name: value for name, value in found.items() if name not in LOSSES}
    shutil.rmtree(folder)
    return {"row": row, "seed": seed, "commit": git_commit(), "settings": settings} | found


def table(content: dict) -> str:
    """The results as markdown; docs/results.md holds it: the mean over the seeds, the least and the most."""
    columns = {f"{word}: {kind}": f"{word}: {title}, %" for word in NEW for kind, title in KINDS.items()} | LOSSES
    lines = [["row", "what is changed", *columns.values()], ["---"] * (2 + len(columns))]
    for row, says in ROWS.items():
        cells = [row, says]
        for name in columns:
            unit, digits = (1, 4) if name in LOSSES else (100, 0)
            values = [unit * run[name] for run in content["runs"] if run["row"] == row and name in run]
            low, mean, high = (f"{of(values or [0]):.{digits}f}" for of in (min, statistics.fmean, max))
            cells.append("" if not values else mean if low == high else f"{mean} ({low} to {high})")
        lines.append(cells)
    settings, versions = content["settings"], content["versions"]
    return (
        f"{content['device']}; {settings['epochs']} epochs; torch {versions['torch']}; {content['date']}, commit "
        f"{', '.join(content['commits'])}:\n\n"
    ) + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the results as markdown and do nothing else")
    args = parser.parse_args()
    content = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {"runs": []}
    if args.table:
        print(table(content) if content["runs"] else f"no results in {OUT}")
        return
    from train_manga_lora import DEMO

    settings = settings_of(DEMO["num_train_epochs"], DEMO["learning_rate"]) | {"prompts": PICTURES}
    results = [result for result in content["runs"] if result["settings"] == settings]
    done = {(result["row"], result["seed"]) for result in results}
    jobs = [(row, seed, settings) for seed in range(SEEDS) for row in ROWS if (row, seed) not in done]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), start_worker, (1,)) as pool:
        for result in pool.imap_unordered(run, jobs):
            results.append(result)
            results.sort(key=lambda result: (list(ROWS).index(result["row"]), result["seed"]))
            write_results(OUT, results, settings)
            found = ", ".join(f"{name} {value:.4g}" for name, value in result.items() if isinstance(value, float))
            print(f"{time.strftime('%H:%M:%S')} {result['row']} seed {result['seed']}: {found}", flush=True)
        pool.close()
        pool.join()


if __name__ == "__main__":
    main()
