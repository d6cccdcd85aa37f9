"""Training speed side by side: this trainer and diffusers' LoRA recipe do the same work and take turns, step by step.

    python bench/bench_training.py                               the demo's base, on whatever device there is
    python bench/bench_training.py --model sd15                  SD 1.5's shapes with random weights
    python bench/bench_training.py --model sd15 --rows a:b8,c:b8 --steps 30
    python bench/bench_training.py --table                       the table of all files in bench/results

Every row's optimizer step: 8 images; LoRA of rank 16 and alpha 32 on to_q, to_k, to_v, to_out.0; noise prediction,
mean squared error, AdamW, gradients clipped to 1. fp16 on CUDA, float32 on a CPU.

    a               this trainer, micro-batch and checkpointing as it chooses (a:b2, a:b8+ckpt, a:ckpt: as named)
    b               what diffusers' train_text_to_image_lora.py does: accelerate, PEFT, autocast, checkpointing,
                    micro-batches of 2, VAE and text encoder in every step
    c:b2, c:b8+ckpt that recipe with latents and text embeddings kept in memory, at this micro-batch; the fastest
                    of these is the rival that counts
    a:b8+cheap, a:b8+graph, a:b8+compile   this trainer with norms and gates computed twice; with its passes as CUDA
                    graphs; with its whole UNet through torch.compile
    d               that script itself, whole, from the diffusers checkout given as --peer

Each row lives in a process of its own and sleeps on a pipe until its turn, so that a machine that warms up or is
shared slows all rows alike; with --one_at_a_time each takes all its steps before the next starts. Row b's pictures are
decoded already, and neither a nor c counts the encoding done once.
"""

import argparse
import contextlib
import datetime
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

EFFECTIVE_BATCH = 8
RANK = 16
ALPHA = 32
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0
SEED = 0
IMAGES = 248  # of rows b and c: whole optimizer steps, so that no epoch ends within one
ALL_ROWS = ["a", "b", "c:b2", "c:b8", "c:b2+ckpt", "c:b8+ckpt"]
ROW = r"a(:ckpt)?|[ac]:b(?P<micro_batch>[1-9]\d*)(\+ckpt)?|a:b(?P<with>[1-9]\d*)\+(cheap|compile|graph)|b|d"
NAMES = {"a": "this trainer", "b": "diffusers' recipe", "c": "recipe, all encoded before", "d": "diffusers' script"}
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")

# The rows: each builder returns one optimizer step as a function, its optimizer, micro-batch and checkpointing -----


def build_ours(args, micro_batch: int | None, checkpointing: bool | None, mode: str | None = None) -> tuple:
    """Row a: train_manga_lora.py's own train_step() on the demo's faces, with random latents and text embeddings.

    None for micro_batch or checkpointing is the trainer's own choice. mode: "cheap", "graph", "compile" or None.
    """
    import torch

    from dataset import MangaFaceDataset
    from train_manga_lora import TrainingConfig, train_step
    from training.denoising import draw_batch
    from training.encoding import EncodedDataset
    from training.memory import MemoryPlan, Plans, choose_plan, free_bytes, leaves_room_for_graphs, memory_plans
    from training.model import build_model
    from training.run import tune_for

    device = torch.device(args.device)
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    config = TrainingConfig(lora_rank=RANK, lora_alpha=ALPHA, learning_rate=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
    tune_for(device)

    faces = ROOT / "demo" / "faces"
    dataset = MangaFaceDataset(faces, faces / "modified_face_250.json", args.resolution)
    model = build_model(config, args.base, device, dtype, log=lambda text: None)
    latent_shape, text_shape = latent_shape_of(args), (77, model.unet.config.cross_attention_dim)
    encoded = EncodedDataset(
        torch.randn(len(dataset.faces), 2, *latent_shape) * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1) + 0.1,
        torch.randn(len(dataset.texts), *text_shape).to(dtype),
        device,
    )
    if checkpointing is None:
        plans = memory_plans(model.unet, latent_shape, text_shape, EFFECTIVE_BATCH, "auto")
        free = free_bytes(device, 1)
        plan = choose_plan(plans, free)
    else:
        twice = "all" if checkpointing else "cheap" if mode == "cheap" else "nothing"
        plans = [plan := MemoryPlan(micro_batch or EFFECTIVE_BATCH, twice, 0.0)]
    model.plans = Plans(model.unet, plans, plan)
    if mode == "compile":  # one graph without breaks, or an error
        model.unet.compile(fullgraph=True, dynamic=False)
    chosen = checkpointing is None and args.device == "cuda" and leaves_room_for_graphs(plan, free)
    model.plans.can_be_graphed = mode == "graph" or chosen
    orders = (dataset.epoch_order(epoch) for epoch in itertools.count())
    whole = len(dataset) - len(dataset) % EFFECTIVE_BATCH  # the few faces left over would make a cheaper step
    batches = (order[start : start + EFFECTIVE_BATCH] for order in orders for start in range(0, whole, EFFECTIVE_BATCH))
    numbers, share, launched = itertools.count(), torch.arange(EFFECTIVE_BATCH), []
    timesteps = model.scheduler.config.num_train_timesteps

    def step() -> None:
        positions = next(batches)
        batch = draw_batch(dataset, positions, SEED, next(numbers), latent_shape, timesteps, config.caption_dropout)
        launched.append(train_step(model, encoded, batch, share, LEARNING_RATE, config))
        if model.graphed and model.graphed.graphed.failure:
            raise RuntimeError(f"no CUDA graph: {model.graphed.graphed.failure}")
        while len(launched) > 1:  # read one step late, as the trainer does
            launched.pop(0)()

    checkpointed = {"nothing": "no", "all": "yes"}.get(plan.checkpointing, plan.checkpointing)
    return step, model.optimizer, plan.micro_batch, checkpointed, model.plans.can_be_graphed


def build_recipe(args, micro_batch: int, checkpointing: bool, cached: bool) -> tuple:
    """Rows b and c: the training loop of diffusers' train_text_to_image_lora.py, on random pictures and token ids.

    cached: latents (mean and deviation) and text embeddings lie in memory; VAE and text encoder are not loaded.

    One thing is done better than there: the script hands its optimizer a generator of parameters, which is used up
    when the clipping comes to it, so that nothing is clipped. Here it is a list, and clipping does its work.
    """
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    precision = "fp16" if args.device == "cuda" else "no"
    accumulation = EFFECTIVE_BATCH // micro_batch
    accelerator = Accelerator(
        cpu=args.device == "cpu", mixed_precision=precision, gradient_accumulation_steps=accumulation
    )
    device, weight_dtype = accelerator.device, torch.float16 if precision == "fp16" else torch.float32

    # The frozen models in the working precision, the LoRA in float32.
    noise_scheduler = DDPMScheduler.from_pretrained(args.base / "scheduler")
    unet = UNet2DConditionModel.from_pretrained(args.base / "unet")
    unet.requires_grad_(False).to(device, weight_dtype)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian", target_modules=TARGETS))
    cast_training_params(unet, torch.float32)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    lora_weights = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(lora_weights, lr=LEARNING_RATE)
    lr_scheduler = get_scheduler("constant", optimizer)

    # What the loader yields: 8-bit pictures and token ids, or what VAE and text encoder made of them.
    if cached:
        mean = torch.randn(IMAGES, *latent_shape_of(args))
        text_embeddings = torch.randn(IMAGES, 77, unet.config.cross_attention_dim).to(weight_dtype)
        faces = torch.utils.data.TensorDataset(mean, torch.full_like(mean, 0.1), text_embeddings)
    else:
        from diffusers import AutoencoderKL
        from transformers import CLIPTextModel

        vae = AutoencoderKL.from_pretrained(args.base / "vae").requires_grad_(False).to(device, weight_dtype)
        text_encoder = CLIPTextModel.from_pretrained(args.base / "text_encoder").requires_grad_(False)
        text_encoder.to(device, weight_dtype)
        pixels = torch.randint(256, (IMAGES, 3, args.resolution, args.resolution), dtype=torch.uint8)
        input_ids = torch.randint(text_encoder.config.vocab_size, (IMAGES, 77))
        faces = torch.utils.data.TensorDataset(pixels, input_ids)
    loader = torch.utils.data.DataLoader(faces, batch_size=micro_batch, shuffle=True)
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(unet, optimizer, loader, lr_scheduler)
    unet.train()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> None:
        train_loss = 0.0
        for batch in itertools.islice(batches, accumulation):
            with accelerator.accumulate(unet):
                if cached:
                    mean, std, text_embeddings = batch
                    latents = (mean + std * torch.randn_like(mean)).to(weight_dtype)
                else:
                    pixels, input_ids = batch
                    latents = vae.encode((pixels / 127.5 - 1.0).to(weight_dtype)).latent_dist.sample()
                    latents = latents * vae.config.scaling_factor
                    text_embeddings = text_encoder(input_ids, return_dict=False)[0]
                noise = torch.randn_like(latents)
                timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(noise),), device=device)
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
                prediction = unet(noisy_latents, timesteps, text_embeddings, return_dict=False)[0]
                loss = F.mse_loss(prediction.float(), noise.float())
                # The script logs two numbers per micro-batch; each waits for the device.
                train_loss += accelerator.gather(loss.repeat(micro_batch)).mean().item() / accumulation
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(lora_weights, MAX_GRAD_NORM)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            loss.item()
        assert accelerator.sync_gradients, "the optimizer step ends with the last micro-batch"

    return step, optimizer, micro_batch, "yes" if checkpointing else "no", False


def latent_shape_of(args) -> tuple[int, int, int]:
    config = json.loads((args.base / "vae" / "config.json").read_text(encoding="utf-8"))
    halvings = len(config["block_out_channels"]) - 1
    return 4, args.resolution >> halvings, args.resolution >> halvings


def run_script(args) -> dict:
    """Row d: diffusers' own script on the demo's faces; a step's time is that between two moves of its progress bar."""
    script = Path(args.peer or "", "examples", "text_to_image", "train_text_to_image_lora.py")
    missing = [package for package in ("datasets", "torchvision") if importlib.util.find_spec(package) is None]
    if missing or not script.is_file():
        return {"skipped": f"needs the package {missing[0]}" if missing else f"needs --peer: there is no {script}"}
    with tempfile.TemporaryDirectory() as folder:
        faces, images = ROOT / "demo" / "faces", Path(folder, "images")
        shutil.copytree(faces, images, ignore=shutil.ignore_patterns("*.json"))
        entries = json.loads((faces / "modified_face_250.json").read_text(encoding="utf-8"))
        lines = [{"file_name": f"{entry['image_name']}.png", "text": entry["captions"][0]} for entry in entries]
        (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        flags = {
            "pretrained_model_name_or_path": args.base,
            "train_data_dir": images,
            "output_dir": f"{folder}/out",
            "cache_dir": f"{folder}/cache",
            "resolution": args.resolution,
            "train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "max_train_steps": args.warmup + args.steps,
            "rank": RANK,
            "learning_rate": LEARNING_RATE,
            "mixed_precision": "fp16" if args.device == "cuda" else "no",
            "seed": SEED,
        }
        command = [sys.executable, str(script), "--gradient_checkpointing", *(f"--{k}={v}" for k, v in flags.items())]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {})
        started, moments, text = time.time(), [], ""
        with subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            while piece := os.read(process.stderr.fileno(), 4096):
                text = (text + piece.decode(errors="replace"))[-8192:]
                done = re.findall(r"Steps:.*?\b(\d+)/\d+ \[", text)
                moments += [time.time() - started] * (int(done[-1]) - len(moments) if done else 0)
    if process.returncode or len(moments) < args.warmup + args.steps:
        lines = re.split(r"[\r\n]+", text.strip())
        reason = next((line for line in reversed(lines) if not line.startswith("Steps:")), "")[:200]  # tqdm ends last
        return {"error": f"exit code {process.returncode} after {len(moments)} steps: {reason}"}
    seconds = [after - before for before, after in itertools.pairwise(moments)][args.warmup - 1 :]
    return {"micro_batch": 2, "checkpointing": "yes", "first_step_s": moments[0], "step_seconds": seconds}


# The processes ---------------------------------------------------------------------------------------------------


def work(connection, row: str, args, started: float) -> None:
    """A row's process: build, warm up, then one timed step per request; at the end its memory and its arithmetic."""
    try:
        named = re.fullmatch(ROW, row)
        micro_batch = int(named["micro_batch"] or named["with"] or 0)
        if micro_batch and EFFECTIVE_BATCH % micro_batch:
            raise ValueError(f"{EFFECTIVE_BATCH} images are no whole number of micro-batches of {micro_batch}")
        import torch

        torch.manual_seed(SEED)
        if row[0] == "a":
            mode = row.split("+")[1] if named["with"] else None
            trainer = build_ours(args, micro_batch or None, None if row == "a" else "ckpt" in row, mode)
        else:
            trainer = build_recipe(args, micro_batch or 2, row == "b" or "ckpt" in row, cached=row != "b")
        step, optimizer, micro_batch, checkpointing, graphed = trainer
        weights = optimizer.param_groups[0]["params"]
        before = [weight.detach().clone() for weight in weights]
        timed(step, args.device)
        first_step_s = time.time() - started
        for _ in range(args.warmup - 1):
            step()
        if args.device == "cuda" and not graphed:  # what a recorded pass needs was allocated for good
            torch.cuda.reset_peak_memory_stats()
        made = {"micro_batch": micro_batch, "checkpointing": checkpointing, "graphed": graphed}
        connection.send(made | {"first_step_s": first_step_s})

        while (request := connection.recv()) == "step":
            connection.send(timed(step, args.device))

        if args.device == "cuda":
            answer = {
                "peak_allocated_mib": torch.cuda.max_memory_allocated() / 2**20,
                "peak_reserved_mib": torch.cuda.max_memory_reserved() / 2**20,
            }
        else:
            import resource

            unit = 2**20 if sys.platform == "darwin" else 2**10
            answer = {"process_peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
        change = torch.cat([(now - then).flatten() for now, then in zip(weights, before, strict=True)])
        answer["weight_change"] = change.norm().item()
        answer["updates"] = int(optimizer.state[weights[0]].get("step", 0))  # under fp16 the first may be skipped
        with contextlib.suppress(Exception):  # what can't be counted was still timed
            with count_flops() as counter:
                step()
            answer["tflop_per_step"] = counter.get_total_flops() / 1e12
            if request == "finish and count":
                answer["useful_tflop_per_step"] = useful_flops(args) / 1e12
        connection.send(answer)
    except (EOFError, KeyboardInterrupt):  # the parent is gone, or going
        pass
    except Exception as error:  # whatever a row trips over must not end the others
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        connection.send({"error": f"{type(error).__name__}: {reason}"})


def timed(act: Callable, device: str) -> tuple[float, float]:
    """When it began and how long it took, in seconds; a GPU, which works behind the program's back, is waited for."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    act()
    wait()
    return start, time.perf_counter() - start


def count_flops():
    """A counter of the arithmetic of matrix products, convolutions and attention; torch's own omits the CPU kernel."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten
    on_cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **__: (
            sdpa_backward_flop_count(gradient, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=on_cpu)


def useful_flops(args) -> int:
    """What a step has to compute: forward and backward of 8 images without any recomputation, counted, not run."""
    import torch
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(args.base / "unet"))
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=RANK, target_modules=TARGETS))
        noise = torch.randn(EFFECTIVE_BATCH, *latent_shape_of(args))
        text_embeddings = torch.randn(EFFECTIVE_BATCH, 77, unet.config.cross_attention_dim)
        with count_flops() as counter:
            unet(noise, torch.zeros(EFFECTIVE_BATCH), text_embeddings, return_dict=False)[0].mean().backward()
    return counter.get_total_flops()


def matmul_tflops(device: str) -> float:
    """What the device reaches on one large matrix product (median): the bar that no training step can pass."""
    import torch

    side, repeats, dtype = (8192, 100, torch.float16) if device == "cuda" else (2048, 9, torch.float32)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = [timed(lambda: left @ right, device)[1] for _ in range(repeats)]
    if device == "cuda":  # the rows need the memory
        del left, right
        torch.cuda.empty_cache()
    return 2 * side**3 / statistics.median(seconds) / 1e12


def lacks_memory(row: str, args) -> str | None:
    """Why a row of sd15 can't be started on a CPU now, if so. The weights are mapped from one file and count once."""
    needed = 1.5 + int((re.search(r":b(\d+)", row) or [0, 2])[1]) * 2.5 * (args.resolution / 512) ** 2
    free = psutil.virtual_memory().available / 2**30
    if args.device == "cpu" and args.model == "sd15" and free < needed:
        return f"not started: it may need {needed:.1f} GiB, and {free:.1f} are free; take fewer rows at once"
    return None


def measure(args) -> list[dict]:
    """The rows' records. They start one after the other, so that each first step is timed alone, then take turns;
    or each takes all its steps before the next one starts.
    """
    context = multiprocessing.get_context("spawn")
    workers, records = {}, {row: {"row": row, "step_starts": [], "step_seconds": []} for row in args.rows}

    def ask(row: str, request: str | None = None):
        process, connection = workers[row]
        try:
            if request:
                connection.send(request)
            answer = connection.recv()
        except (EOFError, OSError):
            process.join()
            answer = {"error": f"its process ended with exit code {process.exitcode} (-9 is mostly out of memory)"}
        if isinstance(answer, dict):
            records[row] |= answer
        if "error" in answer:
            print(f"{row}: {answer['error']}", flush=True)
            process.join()  # before the next row: its memory is needed
            del workers[row]
        return answer

    own = [row for row in args.rows if row != "d"]
    begin = time.perf_counter()
    for together in [[row] for row in own] if args.one_at_a_time else [own]:
        for row in together:
            if reason := lacks_memory(row, args):
                print(f"{row}: {reason}", flush=True)
                records[row]["error"] = reason
                continue
            here, there = context.Pipe()
            process = context.Process(target=work, args=(there, row, args, time.time()), daemon=True)
            process.start()
            there.close()
            workers[row] = process, here
            if "error" not in ask(row):
                print(f"{row}: first step after {records[row]['first_step_s']:.1f} s, warmed up", flush=True)
        for number in range(1, args.steps + 1):
            for row in list(workers):
                answer = ask(row, "step")
                if "error" not in answer:
                    records[row]["step_starts"].append(round(answer[0] - begin, 6))
                    records[row]["step_seconds"].append(round(answer[1], 6))
            if workers and number % max(1, args.steps // 5) == 0:
                print(f"{', '.join(workers)}: step {number} of {args.steps}", flush=True)
        for row, (process, _) in list(workers.items()):
            counted = any("useful_tflop_per_step" in record for record in records.values())
            ask(row, "finish" if counted else "finish and count")
            process.join()
            workers.pop(row, None)
    if "d" in records:
        records["d"] |= run_script(args)
    return list(records.values())


# The account -----------------------------------------------------------------------------------------------------


def summarize(rows: list[dict], peak: float) -> None:
    """Adds to the rows that came through: median and spread, images and arithmetic per second."""
    useful = next((row["useful_tflop_per_step"] for row in rows if "useful_tflop_per_step" in row), None)
    for row in rows:
        if "error" in row or "skipped" in row:
            continue
        p10, median, p90 = np.percentile(row["step_seconds"], (10, 50, 90)).tolist()
        row |= {"median_s": median, "p10_s": p10, "p90_s": p90, "images_per_s": EFFECTIVE_BATCH / median}
        for name, tflop in (("", row.get("tflop_per_step")), ("useful_", useful)):
            if tflop:
                row |= {f"{name}tflops": tflop / median, f"{name}share_of_matmul": tflop / median / peak}


def ratios(rows: list[dict]) -> list[dict]:
    """How many times as fast every a is as b, as the fastest c, and as d: quotients of the median seconds."""
    median = {row["row"]: row["median_s"] for row in rows if "median_s" in row}
    fastest_c = sorted((row for row in median if row[0] == "c"), key=median.get)[:1]
    return [
        {"row": row, "against": rival, "times_as_fast": median[rival] / median[row]}
        for row in median
        if row[0] == "a"
        for rival in ("b", *fastest_c, "d")
        if rival in median
    ]


def results_table(paths: list[Path]) -> str:
    """Markdown for docs/results.md, a table per file.

    GPU memory: allocated, or what passes recorded as CUDA graphs keep. The last two columns: what the step must compute
    per second, as a share of the device's matmul rate; this row's time over that of the first row a, the fastest c's in
    bold.
    """
    text = []
    for path in paths:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        rows, medians = result["rows"], {row["row"]: row["median_s"] for row in result["rows"] if "median_s" in row}
        ours = next((median for row, median in medians.items() if row[0] == "a"), None)
        fastest_c = min((row for row in medians if row[0] == "c"), key=medians.get, default=None)
        on_cuda = any("peak_allocated_mib" in row for row in rows)
        lines = [
            [
                "row",
                "",
                "micro-batch",
                "checkpointing",
                "ms per step (p10 to p90)",
                "images/s",
                "GPU memory" if on_cuda else "memory, whole process",
                "first step",
                "of matmul rate",
                "time / a's",
            ]
        ]
        lines.append(["---"] * len(lines[0]))
        for row in rows:
            line = [row["row"], NAMES[row["row"][0]] + (", recorded" if row.get("graphed") else "")]
            if row["row"] in medians:
                times = f"{row['median_s'] / ours:.2f}" if ours else ""
                kept = "peak_reserved_mib" if row.get("graphed") else "peak_allocated_mib"
                mib = row.get(kept) or row.get("process_peak_rss_mib")
                first, share = f"{row['first_step_s']:.1f} s", row.get("useful_share_of_matmul")
                line += [
                    str(row["micro_batch"]),
                    row["checkpointing"],
                    f"{1000 * row['median_s']:.1f} ({1000 * row['p10_s']:.1f} to {1000 * row['p90_s']:.1f})",
                    f"{row['images_per_s']:.2f}",
                    f"{mib / 1024:.2f} GiB" if mib else "",
                    first,
                    f"{share:.0%}" if share else "",
                    f"**{times}**" if times and row["row"] == fastest_c else times,
                ]
            else:
                line += ["", "", row.get("skipped") or row.get("error"), "", "", "", "", ""]
            lines.append(line)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines = [" | ".join(map(str.ljust, line, widths)) for line in lines]
        model = "SD 1.5's shapes with random weights" if result["model"] == "sd15" else "the demo's base"
        text += [
            f"{result['device']}; {model} at {result['resolution']} px, {result['precision']}; {result['steps']} "
            f"rounds; torch {result['versions']['torch']}, diffusers {result['versions']['diffusers']}; "
            f"{result['date']}, commit {result['commit']}:",
            "",
            *(f"| {line} |" for line in lines),
            "",
        ]
    return "\n".join(text).rstrip()


def make_sd15(folder: Path) -> None:
    """SD 1.5's architecture with random weights, once, as a diffusers folder of 4 GB in float32.

    Uniform within 1 / sqrt(inputs), so that no activation overflows in fp16. Tokenizer and schedule are the demo's.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    print(f"Making {folder}, once", flush=True)
    own = json.loads((ROOT / "demo" / "base" / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    ids = {name: own[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel(
                sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
            ),
            "vae": AutoencoderKL(
                sample_size=512,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **ids
                )
            ),
        }
    torch.manual_seed(SEED)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        for part in ("tokenizer", "scheduler"):
            shutil.copytree(ROOT / "demo" / "base" / part, Path(unfinished, "base", part))
        shutil.copy(ROOT / "demo" / "base" / "model_index.json", Path(unfinished, "base"))
        for part, model in parts.items():
            model.to_empty(device="cpu")
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    bound = weight[0].numel() ** -0.5
                    weight.data.uniform_(-bound, bound)
                else:
                    weight.data.fill_(1.0 if name.endswith("weight") else 0.0)
            model.save_pretrained(Path(unfinished, "base", part))
        os.replace(Path(unfinished, "base"), folder)


def describe_machine(device: str) -> tuple[str, str]:
    """The device in words, and as part of a file name."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name(), re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
    cpuinfo, threads = Path("/proc/cpuinfo"), torch.get_num_threads()
    model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else "")
    return f"{model[1] if model else platform.machine()}, {threads} threads", f"cpu-{threads}-core"


def git_commit() -> str:
    """The commit measured, with "+changes" if files other than results differ from it."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():  # a copy, on another machine
        return "unknown"
    words = ["git", "status", "--porcelain", "--", ".", ":!bench/results"], ["git", "rev-parse", "--short", "HEAD"]
    changes, commit = (
        subprocess.run(line, cwd=ROOT, capture_output=True, encoding="utf-8").stdout.strip() for line in words
    )
    return commit + ("+changes" if changes else "")


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """Flags with their defaults filled in; ends with one line and exit code 2 on bad input."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"bench_training.py: {message}\n")

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", choices=("demo", "sd15"), default="demo")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="[cuda if there is one]")
    parser.add_argument("--resolution", type=int, help="pixels a side [demo 128; sd15 512 on cuda, 256 on cpu]")
    parser.add_argument("--steps", type=int, help="timed rounds, one step of each row [100 on cuda, 10 on cpu]")
    parser.add_argument("--warmup", type=int, help="steps of each row before them, at least 1 [20 on cuda, 2 on cpu]")
    parser.add_argument("--rows", default="", help=f"[{','.join(ALL_ROWS)}, and d with --peer]")
    parser.add_argument(
        "--one_at_a_time", action="store_true", help="rows don't take turns: for cards that can't hold them all at once"
    )
    parser.add_argument("--peer", help="a diffusers checkout, for row d")
    parser.add_argument("--out", type=Path, help="file, or folder for DEVICE-MODEL-RESOLUTION.json [bench/results]")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "bench_sd15", help="where sd15 is kept")
    parser.add_argument("--table", nargs="*", type=Path, metavar="FILE", help="print these results as markdown [all]")
    args = parser.parse_args(words)
    if args.table is not None:
        args.table = args.table or sorted((ROOT / "bench" / "results").glob("*.json"))
        if missing := [path for path in args.table or ["bench/results/*.json"] if not Path(path).is_file()]:
            parser.error(f"--table: there is no {missing[0]}")
        return args
    args.rows = args.rows.split(",") if args.rows else ALL_ROWS + (["d"] if args.peer else [])
    for row in args.rows:
        if not re.fullmatch(ROW, row) or args.rows.count(row) > 1:
            known = "a, a:b8, a:b8+cheap, a:ckpt, b, c:b2, c:b8+ckpt, d"
            parser.error(f"--rows: {row!r} is no row, or named twice; rows are {known}")

    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    on_cuda = args.device == "cuda"
    defaults = {
        "resolution": 128 if args.model == "demo" else 512 if on_cuda else 256,
        "steps": 100 if on_cuda else 10,
        "warmup": 20 if on_cuda else 2,
    }
    for name, value in defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.resolution % 64 or args.resolution < 128:  # VAE and UNet each halve the picture three times
        parser.error(f"--resolution {args.resolution} must be a multiple of 64, at least 128")
    if args.steps < 1 or args.warmup < 1:
        parser.error("--steps and --warmup must be at least 1")
    args.base = ROOT / "demo" / "base" if args.model == "demo" else args.cache
    return args


def main(words: list[str]) -> None:
    args = parse_arguments(words)
    if args.table is not None:
        print(results_table(args.table))
        return
    if args.model == "sd15" and not args.base.is_dir():
        make_sd15(args.base)
    device, slug = describe_machine(args.device)
    result = {
        "device": device,
        "model": args.model,
        "resolution": args.resolution,
        "precision": "fp16" if args.device == "cuda" else "float32",
        "effective_batch": EFFECTIVE_BATCH,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "commit": git_commit(),
        "command": shlex.join(["python", "bench/bench_training.py", *words]),
        "date": datetime.date.today().isoformat(),
        "seed": SEED,
        "warmup": args.warmup,
        "steps": args.steps,
        "matmul_tflops": matmul_tflops(args.device),
    }
    rows = measure(args)
    summarize(rows, result["matmul_tflops"])
    result["ratios"] = ratios(rows)
    out = args.out or ROOT / "bench" / "results"
    if out.suffix != ".json":
        out /= f"{slug}-{args.model}-{args.resolution}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    head, lines = json.dumps(result, indent=1)[:-2], ",\n  ".join(map(json.dumps, rows))  # a line per row
    out.write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
    print(f"\n{results_table([out])}\n")
    for ratio in result["ratios"]:
        print(f"{ratio['row']} is {ratio['times_as_fast']:.2f} times as fast as {ratio['against']}")
    print(f"Written: {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
