"""How well a base draws the demo's faces: `python demo/measure_unet.py [folder of a base]`.

Prints how many of 50 coloured faces look whole, and how well prompts for manga faces are obeyed; writes the 50 to
`demo/.work/base_faces.png`, to be looked at. Takes a minute and a half on two CPU cores.
"""

import dataclasses
import json
import sys
from pathlib import Path

import draw_faces
import numpy as np
import torch
from measure_vae import reconstruct
from PIL import Image
from transformers.utils.logging import set_verbosity_error

DEMO_DIR = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO_DIR.parent))
from evaluation import measures  # noqa: E402
from evaluation.judge import Judge  # noqa: E402
from evaluation.pictures import build_pipeline, draw_pictures  # noqa: E402
from train_manga_lora import DEMO, TrainingConfig  # noqa: E402
from training.base_model import load_text_encoder, load_unet, load_vae  # noqa: E402

PICTURES = {4: 17, 5.5: 17, 7.5: 16}  # by guidance scale
PROMPTS = 96  # in every 32 each attribute is asked for in half
STEPS = 25
LEARNT, HELD_OUT, OTHERS = 200, 30, 30  # real faces: the judge of coherence learns from them, sets its mark, is tested
COLUMNS = 10
SHEET = DEMO_DIR / ".work" / "base_faces.png"


def real_faces(kind, count):
    """Coloured faces as the UNet's pictures are, of other seeds: (uint8 (count, H, W, 3), a caption each)."""
    faces = [draw_faces.colour_lorelei(f"{kind} {index}", DEMO["resolution"]) for index in range(count)]
    return np.stack([np.asarray(picture, dtype=np.uint8) for picture, _ in faces]), [texts[0] for _, texts in faces]


def main():
    set_verbosity_error()  # it misses torchvision, which nothing here needs
    made = [DEMO_DIR / ".work" / "base", DEMO_DIR / "base"]
    base = Path(sys.argv[1]) if len(sys.argv) > 1 else next(folder for folder in made if (folder / "unet").exists())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet, scheduler = load_unet(base, device, torch.float32)
    vae = load_vae(base, device)
    pipe = build_pipeline(vae, unet, scheduler, *load_text_encoder(base, device))
    config = TrainingConfig(**DEMO | {"demo": True, "sample_steps": STEPS})

    def draw(prompts, seeds, guidance):
        shapes = [(config.resolution, config.resolution)] * len(prompts)
        settings = dataclasses.replace(config, guidance_scale=guidance)
        return draw_pictures(pipe, {"prompt": prompts}, seeds, shapes, settings)

    _, captions = real_faces("clean", sum(PICTURES.values()))
    drawn = []
    for guidance, count in PICTURES.items():
        seeds = list(range(len(drawn), len(drawn) + count))
        drawn += draw([captions[seed] for seed in seeds], seeds, guidance)
    SHEET.parent.mkdir(exist_ok=True)
    lines = [np.concatenate(drawn[start : start + COLUMNS], axis=1) for start in range(0, len(drawn), COLUMNS)]
    Image.fromarray(np.concatenate(lines)).save(SHEET)
    real = reconstruct(vae, real_faces("judge", LEARNT + HELD_OUT + OTHERS)[0])
    judge = Judge(real[:LEARNT], real[LEARNT : LEARNT + HELD_OUT], 0)
    passed = judge.passes(np.stack(drawn))
    print(f"{base}\nlook whole: {passed.sum()} of {len(drawn)} faces, at guidance {', '.join(map(str, PICTURES))}")
    print(f"the judge passes {judge.passes(real[-OTHERS:]).sum()} of {OTHERS} real ones", end="")
    print(f" and catches {judge.caught:.2f} of damaged ones; look for yourself: {SHEET}")

    prompts = json.loads((DEMO_DIR / "attributes" / "prompts.json").read_text(encoding="utf-8"))[:PROMPTS]
    guidance = next(iter(PICTURES))
    drawn = measures.squashed(draw(prompts, list(range(PROMPTS)), guidance), measures.ATTRIBUTE_PIXELS)
    network = measures.load_attribute_network()[0]
    with torch.no_grad():
        seen = network(torch.from_numpy(drawn).permute(0, 3, 1, 2) / 127.5 - 1).numpy() > 0
    accuracy = measures.balanced_accuracy(seen, np.array([measures.asked_for(prompt) for prompt in prompts]))
    print(f"{PROMPTS} prompts for manga faces at guidance {guidance}, seen of what was asked for (0.5 is chance):")
    print(", ".join(f"{name} {value:.2f}" for name, value in zip(measures.ATTRIBUTES, accuracy, strict=True)))


if __name__ == "__main__":
    main()
