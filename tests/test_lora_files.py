"""Any LoRA scored: each program's layout against weights merged by hand, and all that isn't a LoRA named.

python -m pytest tests/test_lora_files.py
"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import SD15_CONFIG
from safetensors.torch import load_file, save_file

from evaluation.pictures import build_pipeline
from training.base_model import load_text_encoder, load_unet, load_vae
from training.files import InputError
from training.lora_files import find_lora, fit, put_on, read_lora

CPU = torch.device("cpu")
RANKS = (4, 2)  # of one layer and the next: files may mix them
# Of each kind of layer that programs train, one: (name of the part, path as transformers 4 and kohya have it)
ATTENTION = [
    ("unet", f"down_blocks.0.attentions.0.transformer_blocks.0.{end}")
    for end in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "attn2.to_v")
]
FEED_FORWARD = [
    ("unet", f"mid_block.attentions.0.{end}")
    for end in ("transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2", "proj_in", "proj_out")
]
CONVOLUTIONS = [
    ("unet", path)
    for path in (
        "down_blocks.1.resnets.0.conv1",
        "down_blocks.1.resnets.0.conv_shortcut",
        "up_blocks.0.upsamplers.0.conv",
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.1.resnets.0.time_emb_proj",
    )
]
TEXT = [
    ("text_encoder", f"text_model.encoder.layers.{layer}.{end}")
    for layer in (0, 1)
    for end in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
]


@pytest.fixture(scope="module")
def parts(tiny_base):
    return load_vae(tiny_base, CPU), *load_unet(tiny_base, CPU, torch.float32), *load_text_encoder(tiny_base, CPU)


@pytest.fixture
def new_pipe(parts):
    """A function that makes a pipeline of the tiny base, as fresh as if loaded."""

    def make(clip_skip=1):
        vae, unet, scheduler, tokenizer, text_encoder = parts
        text_encoder = copy.deepcopy(text_encoder)
        layers = getattr(text_encoder, "text_model", text_encoder).encoder.layers
        del layers[len(layers) + 1 - clip_skip :]
        return build_pipeline(vae, copy.deepcopy(unet), scheduler, tokenizer, text_encoder)

    return make


def layer_of(pipe, part: str, path: str):
    model = getattr(pipe, part)
    return model.get_submodule(path if hasattr(model, "text_model") else path.removeprefix("text_model."))


def random_lora(pipe, layers, dtype=torch.float32, alike=False) -> dict:
    """{(part, path): (down, up, alpha)}; every layer has another alpha, unless they are to be alike."""
    generator, lora = torch.Generator().manual_seed(3), {}
    for number, (part, path) in enumerate(layers):
        weight = layer_of(pipe, part, path).weight
        rank, kernel = RANKS[0 if alike else number % 2], weight.shape[2:]
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(weight.shape[0], rank, *(1 for _ in kernel), generator=generator)
        lora[part, path] = (0.3 * down).to(dtype), (0.3 * up).to(dtype), 6.0 if alike else 1.0 + number
    return lora


def merge(pipe, lora):
    """W + alpha / rank * up @ down, by hand."""
    for (part, path), (down, up, alpha) in lora.items():
        weight = layer_of(pipe, part, path).weight
        delta = (up.float().flatten(1) @ down.float().flatten(1)).view_as(weight) * alpha / len(down)
        weight.data += delta
    return pipe


@torch.no_grad()
def outputs(pipe):
    """Of the UNet, with the text encoder's states as its text, and of the text encoder."""
    ids = pipe.tokenizer(["a manga face"], padding="max_length", return_tensors="pt").input_ids
    states = pipe.text_encoder(ids)[0]
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return torch.cat([pipe.unet(latents, 500, states).sample.flatten(), states.flatten()])


# The layouts, each written from scratch -----------------------------------------------------------------------------


def kohya(lora, te="lora_te"):
    tensors = {}
    for (part, path), (down, up, alpha) in lora.items():
        name = {"unet": "lora_unet", "text_encoder": te}[part] + "_" + path.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors |= {f"{name}.alpha": torch.tensor(alpha)}
    return tensors, {}


def kohya_te1(lora):
    return kohya(lora, "lora_te1")


def diffusers_layout(lora, ends=("lora_A", "lora_B")):
    """As save_lora_weights() of a pipeline writes it, with the alphas in the header."""
    tensors, config = {}, {}
    for (part, path), (down, up, alpha) in lora.items():
        tensors |= {f"{part}.{path}.{ends[0]}.weight": down, f"{part}.{path}.{ends[1]}.weight": up}
        path = path.removeprefix("text_model.")  # as transformers 5 has it
        config |= {f"{part}.r": RANKS[0], f"{part}.lora_alpha": 1.0}
        config.setdefault(f"{part}.target_modules", []).append(path)
        config.setdefault(f"{part}.alpha_pattern", {})[path] = alpha
    return tensors, {"lora_adapter_metadata": json.dumps(config)}


def diffusers_without_alphas(lora):
    """Up to 0.33 they weren't stored, but multiplied into the weights: alpha is the rank."""
    scaled = {place: (down, up * alpha / len(down), 0) for place, (down, up, alpha) in lora.items()}
    tensors = {}
    for (part, path), (down, up, _) in scaled.items():
        ends = ("lora.down", "lora.up") if part == "unet" else ("lora_linear_layer.down", "lora_linear_layer.up")
        tensors |= {f"{part}.{path}.{ends[0]}.weight": down, f"{part}.{path}.{ends[1]}.weight": up}
    return tensors, {}


def diffusers_processors(lora, prefix="unet."):
    """Up to 0.18: attention only, by way of processors."""
    scaled = {path: (down, up * alpha / len(down)) for (_, path), (down, up, alpha) in lora.items()}
    tensors = {}
    for path, (down, up) in scaled.items():
        block, _, end = path.rpartition(".to_")
        name = f"{prefix}{block}.processor.to_{end.removesuffix('.0')}_lora"
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    return tensors, {}


def attention_processors_alone(lora):
    """Older still: of the UNet alone, without its name."""
    return diffusers_processors(lora, "")


EVERYTHING = ATTENTION + FEED_FORWARD + CONVOLUTIONS + TEXT
FULL = "kohya with feed-forward, convolutions and text encoder"
LAYOUTS = {
    "kohya": (kohya, ATTENTION),
    FULL: (kohya, EVERYTHING),
    "text encoder alone": (kohya, TEXT),
    "te1": (kohya_te1, ATTENTION + TEXT),
    "diffusers": (diffusers_layout, EVERYTHING),
    "diffusers without alphas": (diffusers_without_alphas, EVERYTHING),
    "processors": (diffusers_processors, ATTENTION),
    "processors alone": (attention_processors_alone, ATTENTION),
}


def written(folder, layout, lora):
    file = folder / "theirs.safetensors"
    tensors, header = layout(lora)
    save_file(tensors, file, header)
    return file


def load(pipe, file):
    put_on(pipe, fit(file, read_lora(file), pipe.unet, pipe.text_encoder))
    return outputs(pipe)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_draws_as_weights_merged_by_hand_and_is_taken_off_whole(new_pipe, tmp_path, name):
    layout, layers = LAYOUTS[name]
    pipe = new_pipe()
    lora, before = random_lora(pipe, layers), outputs(pipe)
    ours = load(pipe, written(tmp_path, layout, lora))
    assert torch.allclose(ours, outputs(merge(new_pipe(), lora)), atol=2e-5)
    assert (ours - before).abs().max() > 0.01
    pipe.unload_lora_weights()
    assert torch.equal(outputs(pipe), before)


@pytest.mark.parametrize("name", [FULL, "diffusers", "processors"])
def test_every_layout_draws_to_the_bit_what_diffusers_own_loader_makes_of_the_file(new_pipe, tmp_path, name):
    """If all layers have one alpha: of several, diffusers gives all layers in kohya's layout the most frequent one."""
    layout, layers = LAYOUTS[name]
    pipe, theirs = new_pipe(), new_pipe()
    file = written(tmp_path, layout, random_lora(pipe, layers, torch.float16, alike=True))
    theirs.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert torch.equal(load(pipe, file), outputs(theirs))


@pytest.mark.parametrize(("part", "use_rslora"), [("unet", True), ("text_encoder", False)])
def test_a_folder_that_peft_saved_draws_as_peft_s_own_model(new_pipe, tmp_path, part, use_rslora):
    from peft import LoraConfig, get_peft_model

    pipe, theirs = new_pipe(), new_pipe()
    targets = {"unet": ["attn1.to_q", "ff.net.2", "conv1"], "text_encoder": ["q_proj", "fc1"]}[part]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=use_rslora, init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(getattr(theirs, part), config)
    model.save_pretrained(tmp_path / "adapter")
    ours = load(pipe, find_lora(tmp_path / "adapter"))
    assert torch.allclose(ours, outputs(theirs), atol=2e-5)
    assert not torch.allclose(ours, outputs(new_pipe()), atol=1e-2)


def test_layers_that_clip_skip_took_away_are_left_out_and_no_others(new_pipe, tmp_path):
    lora = random_lora(new_pipe(), TEXT)
    ours = load(new_pipe(clip_skip=2), written(tmp_path, kohya, lora))
    first = {place: part for place, part in lora.items() if ".layers.0." in place[1]}
    assert len(first) == len(lora) / 2
    assert torch.allclose(ours, outputs(merge(new_pipe(clip_skip=2), first)), atol=2e-5)


def test_a_pickle_of_tensors_holds_what_the_safetensors_does(parts, tmp_path):
    file = written(tmp_path, kohya, random_lora(SimpleNamespace(unet=parts[1]), ATTENTION))
    torch.save(load_file(file), file.with_suffix(".pt"))
    one, other = read_lora(file), read_lora(file.with_suffix(".pt"))
    assert one.keys() == other.keys() and len(one) == len(ATTENTION)
    for name, (down, up, alpha) in one.items():
        assert down.equal(other[name].down) and up.equal(other[name].up) and alpha == other[name].alpha


def test_all_264_layers_of_kohya_s_sd15_lora_find_their_place(tmp_path):
    """Its trainer says "create LoRA for Text Encoder: 72 modules" and "for U-Net: 192 modules"."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15_CONFIG)
        text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072))
    tensors = {}

    def add(prefix, root, parents):  # as kohya does: every linear layer and convolution in modules of these classes
        for name, module in root.named_modules():
            if type(module).__name__ not in parents:
                continue
            for path, layer in module.named_modules():
                if type(layer).__name__ in ("Linear", "LoRACompatibleLinear", "Conv2d"):
                    (out, width), kernel = layer.weight.shape[:2], layer.weight.shape[2:]
                    full = f"{prefix}.{name}.{path}".replace(".", "_")
                    tensors[f"{full}.lora_down.weight"] = torch.zeros(1, width, *kernel, dtype=torch.float16)
                    tensors[f"{full}.lora_up.weight"] = torch.zeros(out, 1, *kernel, dtype=torch.float16)
                    tensors[f"{full}.alpha"] = torch.tensor(1.0)

    add("lora_unet", unet, ("Transformer2DModel",))
    prefix = "lora_te" if hasattr(text_encoder, "text_model") else "lora_te_text_model"  # as transformers 4 has it
    add(prefix, text_encoder, ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"))
    save_file(tensors, file := tmp_path / "theirs.safetensors")
    parts = read_lora(file)
    fitted = fit(file, parts, unet, text_encoder)
    assert {name: len(layers) for name, layers in fitted.items()} == {"unet": 192, "text_encoder": 72}


# What isn't a LoRA, or not one for this base: named, in one line ----------------------------------------------------


def wide(width):
    """A LoRA for a base whose text is so wide."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    return {f"{name}.lora_down.weight": torch.ones(4, width), f"{name}.lora_up.weight": torch.ones(8, 4)}


def halved(tensors):
    return dict(list(tensors.items())[1:])


GOOD = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PAIR = {f"{GOOD}.lora_down.weight": torch.ones(4, 16), f"{GOOD}.lora_up.weight": torch.ones(16, 4)}
STRANGE = {name.replace("mid_block", "joint_blocks"): tensor for name, tensor in PAIR.items()}
REFUSED = {  # what is in the file, words of the message
    "a base": ({"model.diffusion_model.out.2.bias": torch.ones(4)}, "is no LoRA, but a base model: name it as --pretr"),
    "a UNet": ({"down_blocks.0.resnets.0.conv1.bias": torch.ones(4)}, "is no LoRA, but part of a base model"),
    "a VAE": (
        {"first_stage_model.decoder.conv_in.bias": torch.ones(4)},
        "is no LoRA, but part of a base model, a UNet",
    ),
    "diffusers' VAE": ({"decoder.conv_in.bias": torch.ones(4)}, "is no LoRA, but part of a base model"),
    "an embedding": ({"emb_params": torch.ones(3, 768)}, "is no LoRA, but an embedding"),
    "diffusers' embedding": ({"<manga>": torch.ones(768)}, "is no LoRA, but an embedding"),
    "a LoHa": ({f"{GOOD}.hada_w1_a": torch.ones(4, 16)}, "is no LoRA, but a LyCORIS network"),
    "something else": ({"weights": torch.ones(3)}, "its first tensor is 'weights'"),
    "nothing": ({}, "is no LoRA, but empty"),
    "DoRA": (PAIR | {f"{GOOD}.dora_scale": torch.ones(16)}, "dora_scale', which diffusers leaves out"),
    "a lone alpha": (PAIR | {f"{GOOD}_lora.alpha": torch.tensor(1.0)}, "_lora.alpha', which diffusers leaves out"),
    "a name that colours the screen": ({f"{GOOD}\x1b[31m.lora_up.weight": torch.ones(4, 4)}, "\\x1b[31m' has one half"),
    "half of a layer": (halved(PAIR), "one half of its LoRA only"),
    "not finite": ({name: tensor * float("inf") for name, tensor in PAIR.items()}, "not finite"),
    "SDXL, by shape": (wide(2048), "is for SDXL, whose text is 2048 wide; this base's is 16"),
    "SDXL, by name": (
        {name.replace("unet_mid_block", "te2_text_model"): tensor for name, tensor in PAIR.items()},
        "is for SDXL",
    ),
    "SD 2": (wide(1024), "is for Stable Diffusion 2.x, whose text is 1024 wide; this base's is 16"),
    "SD 1.5 on the tiny base": (wide(768), "is for Stable Diffusion 1.x"),
    "another width": (wide(512), "is for another model, whose text is 512 wide"),
    "another architecture": (STRANGE, "1 of its 1 layers aren't in this base"),
    "other shapes": (
        {f"{GOOD}.lora_down.weight": torch.ones(4, 8), f"{GOOD}.lora_up.weight": torch.ones(8, 4)},
        "is for another model",
    ),
}


@pytest.mark.parametrize(
    "header",
    [
        '{"unet.lora_alpha": "much"}',
        '{"unet.lora_alpha": 1e999}',
        '{"unet.alpha_pattern": [1]}',
        '{"unet.alpha_pattern": {"to_q": null}}',
        "{",
        "[" * 100_000,
    ],
)
def test_a_damaged_note_of_alphas_is_one_line(pipe, tmp_path, header):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 16), f"{name}.lora_B.weight": torch.ones(16, 4)}
    save_file(tensors, tmp_path / "theirs.safetensors", {"lora_adapter_metadata": header})
    refusal(pipe, tmp_path / "theirs.safetensors")


def refusal(pipe, file):
    with pytest.raises(InputError) as refused:
        fit(file, read_lora(find_lora(file)), pipe.unet, pipe.text_encoder)
    message = str(refused.value)
    assert len(message.splitlines()) == 1 and len(message) < 400 and str(file) in message, message
    return message


@pytest.fixture(scope="module")
def pipe(parts):
    vae, unet, scheduler, tokenizer, text_encoder = parts
    return build_pipeline(vae, unet, scheduler, tokenizer, text_encoder)


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_lora_or_not_for_this_base_is_told_what_it_is(pipe, tmp_path, name):
    tensors, words = REFUSED[name]
    save_file(tensors, tmp_path / "theirs.safetensors")
    assert words in refusal(pipe, tmp_path / "theirs.safetensors")


def test_what_can_not_be_read_is_told_in_one_line(pipe, tmp_path, tiny_base):
    file = tmp_path / "theirs.safetensors"
    assert "neither a file nor a folder" in refusal(pipe, file)
    file.write_text("not what its name says\n" * 20)
    assert "can't be read as a LoRA" in refusal(pipe, file)
    save_file(PAIR, file)
    file.write_bytes(file.read_bytes()[:-7])
    assert "can't be read as a LoRA" in refusal(pipe, file)
    file.with_suffix(".png").touch()
    assert "is no LoRA file" in refusal(pipe, file.with_suffix(".png"))
    embedding = {"string_to_param": {"*": torch.ones(3, 768)}, "name": "manga"}
    torch.save(embedding, file.with_suffix(".pt"))
    assert "is no LoRA, but an embedding (textual inversion): name a LoRA" in refusal(pipe, file.with_suffix(".pt"))
    assert "is a base model" in refusal(pipe, tiny_base)
    assert "part of a base model" in str(refusal(pipe, tiny_base / "unet" / "diffusion_pytorch_model.safetensors"))
    (tmp_path / "empty").mkdir()
    assert "holds no LoRA file" in refusal(pipe, tmp_path / "empty")
    for name in "ab":
        save_file(PAIR, tmp_path / "empty" / f"{name}.safetensors")
    assert "holds 2 files: name one of them" in refusal(pipe, tmp_path / "empty")


def test_a_base_of_gigabytes_is_not_read_to_say_what_it_is(tmp_path, pipe):
    header = json.dumps({"model.diffusion_model.x": {"dtype": "F16", "shape": [2**31], "data_offsets": [0, 2**32]}})
    file = tmp_path / "base.safetensors"
    with open(file, "wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header.encode())
        opened.truncate(8 + len(header) + 2**32)  # a hole: nothing of it is on the disk
    assert "is no LoRA, but a base model" in refusal(pipe, file)
