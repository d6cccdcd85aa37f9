"""lora_layers.py against diffusers, PEFT and the formula. CPU, offline, tiny random weights."""

import math
import os
import pickle
import sys
import types

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import (
    ENDS,
    assert_same_tensors,
    base_weights,
    gradients_of,
    output,
    randomise,
    with_lora,
)
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from lora_layers import (
    GradientPenalty,
    LoRAAttnProcessor,
    LoRALinearLayer,
    LoRASelfCheckError,
    flatten_lora,
    inject_lora,
    load_lora_weights,
    lora_modules,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    save_lora_weights,
    unmerge_lora,
)


def test_layer_is_the_formula_in_float64():
    torch.manual_seed(0)
    layer = LoRALinearLayer(6, 5, rank=3, network_alpha=7).double()
    nn.init.normal_(layer.up_weight)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    expected = 7 / 3 * x @ layer.down_weight.T @ layer.up_weight.T
    assert layer(x).dtype == torch.float64
    torch.testing.assert_close(layer(x), expected, rtol=1e-14, atol=1e-14)


def test_layer_answers_in_the_inputs_dtype_and_stays_fp32():
    layer = LoRALinearLayer(6, 5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert layer(torch.ones(1, 6, dtype=dtype)).dtype == dtype
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert (layer.rank, layer.network_alpha, layer.scale) == (16, 32, 2.0)
    assert (layer.down_weight.shape, layer.up_weight.shape) == ((16, 6), (5, 16))


@pytest.mark.parametrize("rank, alpha", [(0, 1), (-1, 1), (4, 0), (4, -2), (4.0, 4), (4, 2.5), (True, 4)])
def test_layer_refuses_rank_or_alpha_that_is_no_positive_integer(rank, alpha):
    with pytest.raises(ValueError, match="integer of at least 1"):
        LoRALinearLayer(8, 8, rank=rank, network_alpha=alpha)


def test_penalty_at_the_start_of_sd15_is_modules_times_rank_over_3(sd15_unet):
    torch.manual_seed(0)
    layers = lora_modules(sd15_unet).values()
    model = nn.ModuleList(LoRALinearLayer(m.down_weight.shape[1], m.up_weight.shape[0]) for m in layers)
    penalty = GradientPenalty(1e-5)(model)
    assert penalty.dtype == torch.float32 and penalty.shape == ()
    assert penalty.item() == pytest.approx(128 * 16 / 3 * 1e-5, rel=0.01)
    assert all(m.down_weight.abs().max() <= 1 / math.sqrt(m.down_weight.shape[1]) for m in model)
    assert all(not m.up_weight.any() for m in model)


def test_penalty_is_the_sum_of_squares_and_its_gradient_twice_the_weight(pristine_unet):
    unet = with_lora(pristine_unet).double()
    penalty = GradientPenalty(0.5)(unet)
    assert penalty.dtype == torch.float64
    expected = 0.5 * sum((p.detach() ** 2).sum() for p in lora_parameters(unet))
    torch.testing.assert_close(penalty.detach(), expected, rtol=1e-12, atol=0)
    penalty.backward()
    for weight in lora_parameters(unet):
        torch.testing.assert_close(weight.grad, weight.detach())
    with pytest.raises(ValueError, match="no LoRALinearLayer"):
        GradientPenalty(0.5)(pristine_unet)
    for factor in (-1e-5, math.nan, math.inf):
        with pytest.raises(ValueError, match="penalty_factor"):
            GradientPenalty(factor)


# injection


def test_before_the_first_step_the_unet_answers_as_the_base_bit_for_bit(pristine_unet, unet, batch):
    processors = inject_lora(unet, rank=4, network_alpha=8)
    assert list(processors) == list(unet.attn_processors)
    assert all(isinstance(unet.attn_processors[name], LoRAAttnProcessor) for name in processors)
    assert torch.equal(output(unet, batch), output(pristine_unet, batch))


def test_only_fp32_lora_weights_are_trainable(unet):
    inject_lora(unet, rank=4, network_alpha=8)
    trainable = [p for p in unet.parameters() if p.requires_grad]
    assert isinstance(lora_parameters(unet), list)
    assert {id(p) for p in trainable} == {id(p) for p in lora_parameters(unet)} and len(trainable) == 256
    assert {p.dtype for p in trainable} == {torch.float32}


def test_sd15_has_128_modules_and_3188736_parameters_under_kohyas_names(sd15_unet):
    layers = lora_modules(sd15_unet)
    blocks = [f"down_blocks_{i}_attentions_{j}" for i in (0, 1, 2) for j in (0, 1)]
    blocks += [f"up_blocks_{i}_attentions_{j}" for i in (1, 2, 3) for j in (0, 1, 2)]
    blocks += ["mid_block_attentions_0"]
    expected = {
        f"lora_unet_{block}_transformer_blocks_0_{attention}_{projection}"
        for block in blocks
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out_0")
    }
    assert set(layers) == expected and len(layers) == 128
    assert sum(p.numel() for p in lora_parameters(sd15_unet)) == 3_188_736


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_sd15_file_has_exactly_these_keys_and_6_and_a_half_megabytes(sd15_unet, tmp_path, suffix):
    unet = sd15_unet
    for processor in unet.attn_processors.values():  # the LoRA alone gets memory: the base stays on meta
        processor.to_empty(device="cpu")
        for weight in processor.parameters():
            nn.init.zeros_(weight)
    path = save_lora_weights(unet, tmp_path / f"pytorch_lora_weights{suffix}")
    saved = torch.load(path) if suffix == ".bin" else safetensors.torch.load_file(path)
    assert set(saved) == {f"{name}.{end}" for name in lora_modules(unet) for end in ENDS}
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
    assert 6.35e6 < path.stat().st_size < 6.55e6  # 6.42 MB as .safetensors, 6.51 MB as .bin


def test_injection_is_refused_without_attention_twice_or_incomplete(unet):
    with pytest.raises(ValueError, match="no attention"):
        inject_lora(nn.Sequential(nn.Linear(2, 2)))
    unet.extra = nn.Module()  # an attention that takes no processor would stay untrained, silently
    unet.extra.to_q, unet.extra.to_out = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="128 LoRA layers for 33 attentions"):
        inject_lora(unet)
    del unet.extra
    with pytest.raises(ValueError, match="rank"):
        inject_lora(unet, rank=0)
    assert all(p.requires_grad for p in unet.parameters()) and not lora_modules(unet)
    inject_lora(unet)
    with pytest.raises(ValueError, match="already injected"):
        inject_lora(unet)


def test_without_lora_there_is_nothing_to_train_save_or_merge(unet, tmp_path):
    save = lambda unet: save_lora_weights(unet, tmp_path / "a.bin")  # noqa: E731
    for function in (lora_parameters, lora_state_dict, merge_lora, save):
        with pytest.raises(ValueError, match="no LoRA is injected"):
            function(unet)


def test_xformers_requested_but_missing_is_a_clear_error(unet, monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ImportError, match="pip install xformers"):
        inject_lora(unet, use_xformers=True)
    assert not lora_modules(unet)


# the attention processor


def fake_xformers(monkeypatch):
    """xformers' interface, (B, T, heads, width) and a bias that is not broadcast, in plain PyTorch."""

    def attention(query, key, value, attn_bias=None):
        scores = torch.einsum("bqhc,bkhc->bhqk", query, key) / math.sqrt(query.shape[-1])
        if attn_bias is not None:
            assert attn_bias.shape == scores.shape
            scores = scores + attn_bias
        return torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), value)

    ops = types.SimpleNamespace(memory_efficient_attention=attention)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


@pytest.mark.parametrize("use_xformers", [False, True])
@pytest.mark.parametrize(
    "options, four_d, cross, masked",
    [
        ({}, False, False, False),
        ({"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"}, False, True, False),
        ({"cross_attention_dim": 12}, False, True, True),
        ({"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2}, True, False, False),
        ({"bias": True}, False, False, True),
    ],
)
def test_processor_does_with_every_option_of_a_unet_what_diffusers_does(
    options, four_d, cross, masked, use_xformers, monkeypatch
):
    if use_xformers:
        fake_xformers(monkeypatch)
    torch.manual_seed(0)
    attn = Attention(query_dim=32, heads=2, dim_head=16, **options)
    for norm in (m for m in attn.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)):
        nn.init.normal_(norm.weight)
    x = torch.randn(2, 32, 4, 4) if four_d else torch.randn(2, 9, 32)
    context = torch.randn(2, 5, 12) if cross else None
    mask = torch.randn(2, 1, 5 if cross else 9) if masked else None
    inputs = {"encoder_hidden_states": context, "attention_mask": mask}

    attn.set_processor(AttnProcessor2_0())
    expected = attn(x, **inputs)
    processor = LoRAAttnProcessor(attn, rank=2, network_alpha=3, use_xformers=use_xformers)
    attn.set_processor(processor)
    torch.testing.assert_close(attn(x, **inputs), expected, rtol=0, atol=1e-5 if use_xformers else 0)

    # and with LoRA, what diffusers does with the sums as weights
    for layer in processor.lora.values():
        nn.init.normal_(layer.up_weight)
    adapted = attn(x, **inputs)
    linears = {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v, "out": attn.to_out[0]}
    assert processor.lora.keys() == linears.keys()
    for name, layer in processor.lora.items():
        linears[name].weight.data += 1.5 * layer.up_weight.data @ layer.down_weight.data
    attn.set_processor(AttnProcessor2_0())
    torch.testing.assert_close(adapted, attn(x, **inputs), rtol=1e-4, atol=1e-4)
    assert (adapted - expected).abs().max() > 0.1


def test_flat_weights_are_the_layers_own_memory(pristine_unet, batch):
    unet, reference = with_lora(pristine_unet), with_lora(pristine_unet)
    flat = flatten_lora(unet)
    assert flat.shape == (sum(p.numel() for p in lora_parameters(reference)),)
    unet(*batch).sample.square().mean().backward()
    expected = torch.cat([gradient.flatten() for gradient in gradients_of(reference, batch, scale=1.0)])
    assert torch.equal(flat.grad, expected)
    GradientPenalty(0.5)(flat).backward()
    torch.testing.assert_close(flat.grad, expected + flat.detach())
    assert GradientPenalty(0.5)(flat).item() == pytest.approx(GradientPenalty(0.5)(unet).item(), rel=1e-6)
    with torch.no_grad():
        flat.fill_(0.25)
    assert all((weight == 0.25).all() for weight in lora_parameters(unet))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_base_trains_fp32_lora(unet, batch, dtype):
    unet.to(dtype)
    inject_lora(unet, rank=4, network_alpha=8)
    randomise(unet)
    latents, timesteps, text = batch
    sample = unet(latents.to(dtype), timesteps, text.to(dtype)).sample
    assert sample.dtype == dtype and sample.isfinite().all()
    sample.float().square().mean().backward()
    for weight in lora_parameters(unet):
        assert weight.dtype == weight.grad.dtype == torch.float32
        assert weight.grad.isfinite().all() and weight.grad.any()


def test_autocast_gives_the_fp32_result_within_bf16_and_keeps_fp32_gradients(pristine_unet, batch):
    unet = with_lora(pristine_unet)
    expected = output(unet, batch)
    with torch.autocast("cpu", torch.bfloat16):
        sample = unet(*batch).sample
    torch.testing.assert_close(sample.detach().float(), expected, rtol=0, atol=0.05)
    sample.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in lora_parameters(unet))


# training


def test_first_loss_moves_every_up_weight_and_no_base_weight(unet, batch):
    inject_lora(unet, rank=4, network_alpha=8)
    before = base_weights(unet)
    optimizer = torch.optim.AdamW(lora_parameters(unet), lr=1e-2)
    unet(*batch).sample.square().mean().backward()
    assert all(layer.up_weight.grad.any() for layer in lora_modules(unet).values())
    assert not any(layer.down_weight.grad.any() for layer in lora_modules(unet).values())  # up is still zero
    lora = {id(p) for p in lora_parameters(unet)}
    assert all(p.grad is None for p in unet.parameters() if id(p) not in lora)
    optimizer.step()
    assert all(layer.up_weight.any() for layer in lora_modules(unet).values())
    assert_same_tensors(base_weights(unet), before)


def test_gradients_are_the_same_with_checkpointing(pristine_unet, batch):
    gradients = []
    for checkpointing in (False, True):
        unet = with_lora(pristine_unet).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(*batch).sample.square().mean().backward()
        gradients.append({str(i): p.grad for i, p in enumerate(lora_parameters(unet))})
    assert all(gradient.any() for gradient in gradients[0].values())
    assert_same_tensors(*gradients)


def test_output_and_gradients_equal_pefts(pristine_unet, unet, batch):
    peft = pytest.importorskip("peft")
    ours = with_lora(pristine_unet, rank=4, alpha=6)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets), unet)
    theirs = {
        "lora_unet_" + path.replace(".", "_"): [part["default"].weight for part in (module.lora_A, module.lora_B)]
        for path, module in unet.named_modules()
        if hasattr(module, "lora_A")
    }
    assert theirs.keys() == lora_modules(ours).keys()
    with torch.no_grad():
        for name, layer in lora_modules(ours).items():
            theirs[name][0].copy_(layer.down_weight)
            theirs[name][1].copy_(layer.up_weight)
    samples = [model(*batch).sample for model in (ours, unet)]
    assert (samples[0] - output(pristine_unet, batch)).abs().max() > 0.05
    torch.testing.assert_close(*samples, rtol=0, atol=1e-5)
    for sample in samples:
        sample.square().mean().backward()
    for name, layer in lora_modules(ours).items():
        torch.testing.assert_close(layer.down_weight.grad, theirs[name][0].grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(layer.up_weight.grad, theirs[name][1].grad, rtol=1e-3, atol=1e-6)


# merging


def test_merged_unet_answers_as_the_unmerged_and_unmerging_restores_every_bit(pristine_unet, batch):
    unet = with_lora(pristine_unet)
    before, expected = base_weights(unet), output(unet, batch)
    merge_lora(unet)
    torch.testing.assert_close(output(unet, batch), expected, rtol=0, atol=1e-5)
    changed = [name for name, weight in base_weights(unet).items() if not torch.equal(weight, before[name])]
    assert len(changed) == 128
    with pytest.raises(ValueError, match="already merged"):
        merge_lora(unet)
    unmerge_lora(unet)
    assert_same_tensors(base_weights(unet), before)
    assert torch.equal(output(unet, batch), expected)
    with pytest.raises(ValueError, match="not merged"):
        unmerge_lora(unet)


def test_merging_into_bf16_is_summed_in_fp32_and_restored(unet):
    unet.to(torch.bfloat16)
    inject_lora(unet, rank=4, network_alpha=8)
    randomise(unet)
    before = base_weights(unet)
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer = attn.processor.lora["out"]
    expected = (attn.to_out[0].weight.float() + 2 * layer.up_weight @ layer.down_weight).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        merge_lora(unet)
    assert torch.equal(attn.to_out[0].weight, expected)
    unmerge_lora(unet)
    assert_same_tensors(base_weights(unet), before)


# files


def pipeline(unet):
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("rank, alpha", [(4, 4), (4, 6)])
def test_diffusers_loads_the_file_at_the_trained_strength(
    pristine_unet, unet, batch, tmp_path, monkeypatch, rank, alpha, suffix
):
    trained = with_lora(pristine_unet, rank, alpha)
    monkeypatch.chdir(tmp_path)
    save_lora_weights(trained, f"lora_output/pytorch_lora_weights{suffix}", torch.float32)
    pipe = pipeline(unet)
    pipe.load_lora_weights(f"lora_output/pytorch_lora_weights{suffix}")  # the README's line
    expected = output(trained, batch)
    assert (expected - output(pristine_unet, batch)).abs().max() > 0.05
    torch.testing.assert_close(output(pipe.unet, batch), expected, rtol=0, atol=1e-5)


def test_diffusers_loads_the_fp16_file_from_its_folder(pristine_unet, unet, batch, tmp_path):
    trained = with_lora(pristine_unet)
    save_lora_weights(trained, tmp_path / "pytorch_lora_weights.safetensors")
    pipe = pipeline(unet)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(output(pipe.unet, batch), output(trained, batch), rtol=0, atol=2e-3)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_loading_restores_the_saved_weights_into_a_plain_and_into_an_injected_unet(
    pristine_unet, unet, batch, tmp_path, suffix
):
    trained = with_lora(pristine_unet, rank=3, alpha=5)
    before = base_weights(trained)
    path = save_lora_weights(trained, tmp_path / f"a{suffix}", torch.float32)
    assert_same_tensors(base_weights(trained), before)
    load_lora_weights(unet, path)
    assert_same_tensors(lora_state_dict(unet, torch.float32), lora_state_dict(trained, torch.float32))
    assert torch.equal(output(unet, batch), output(trained, batch))
    assert len([p for p in unet.parameters() if p.requires_grad]) == 256
    randomise(unet, seed=9)
    load_lora_weights(unet, path)
    assert torch.equal(output(unet, batch), output(trained, batch))


def test_state_dict_is_a_copy_with_alpha(pristine_unet):
    unet = with_lora(pristine_unet, rank=4, alpha=8)
    state = lora_state_dict(unet, torch.float32)
    assert set(state) == {f"{name}.{end}" for name in lora_modules(unet) for end in ENDS}
    for name, layer in lora_modules(unet).items():
        assert state[f"{name}.alpha"].shape == () and state[f"{name}.alpha"].item() == 8
        assert state[f"{name}.lora_up.weight"].data_ptr() != layer.up_weight.data_ptr()
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())
    for dtype in (torch.int32, torch.bfloat16):
        with pytest.raises(ValueError, match="cannot hold"):
            lora_state_dict(with_lora(pristine_unet, rank=4, alpha=257), dtype)


def test_equal_weights_give_equal_bin_bytes_under_any_name(pristine_unet, tmp_path):
    first = save_lora_weights(with_lora(pristine_unet), tmp_path / "first.bin")
    second = save_lora_weights(with_lora(pristine_unet), tmp_path / "second_name.bin")
    other = save_lora_weights(with_lora(pristine_unet, seed=3), tmp_path / "third.bin")
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()


def test_safetensors_header_has_kohyas_fields_and_ours_as_strings(pristine_unet, tmp_path):
    unet = with_lora(pristine_unet, rank=4, alpha=8)
    path = save_lora_weights(
        unet, tmp_path / "manga.safetensors", metadata={"ss_epoch": 7, "ss_base_model_version": "other"}
    )
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    hashes = {key: metadata.pop(key) for key in ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")}
    assert all(hashes.values()) and metadata == {
        "format": "pt",
        "ss_base_model_version": "other",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "8",
        "ss_epoch": "7",
    }
    with safetensors.safe_open(save_lora_weights(unet, tmp_path / "b.safetensors"), "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sd_v1"


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("damage", ["torn", "bit flipped", "other weights"])
def test_a_file_that_reads_back_differently_is_refused_and_the_old_one_stays(
    pristine_unet, tmp_path, monkeypatch, suffix, damage
):
    unet = with_lora(pristine_unet)
    path = save_lora_weights(unet, tmp_path / f"a{suffix}")
    old = path.read_bytes()
    other = save_lora_weights(with_lora(pristine_unet, seed=3), tmp_path / "other" / f"a{suffix}").read_bytes()

    def damaging_fsync(descriptor):
        (temporary,) = tmp_path.glob(".*.tmp")
        content = bytearray(temporary.read_bytes())
        if damage == "torn":
            content = content[: len(content) // 2]
        elif damage == "bit flipped":  # inside a tensor's values: no parser notices
            layer = next(iter(lora_modules(unet).values()))
            content[content.index(layer.up_weight.detach().half().numpy().tobytes())] ^= 1
        else:
            content = other
        temporary.write_bytes(content)

    randomise(unet, seed=4)
    monkeypatch.setattr(os, "fsync", damaging_fsync)
    with pytest.raises(LoRASelfCheckError, match="read back"):
        save_lora_weights(unet, path)
    assert path.read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"a{suffix}", "other"]


@pytest.mark.parametrize("value, dtype", [(math.nan, torch.float32), (math.inf, torch.float32), (7e4, torch.float16)])
def test_weights_that_are_not_finite_are_refused_by_name_and_nothing_is_left(pristine_unet, tmp_path, value, dtype):
    unet = with_lora(pristine_unet)
    name, layer = list(lora_modules(unet).items())[50]
    with torch.no_grad():
        layer.up_weight[1, 1] = value
    for suffix in (".bin", ".safetensors"):
        with pytest.raises(LoRASelfCheckError, match=name):
            save_lora_weights(unet, tmp_path / f"a{suffix}", dtype)
    assert list(tmp_path.iterdir()) == []


def test_other_suffixes_are_refused(pristine_unet, tmp_path):
    for function in (save_lora_weights, load_lora_weights):
        with pytest.raises(ValueError, match="suffix must be"):
            function(with_lora(pristine_unet), tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


class Malicious:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


def test_a_malicious_pickle_is_refused_and_not_executed(unet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Malicious()}, tmp_path / "new.bin")
    (tmp_path / "old.bin").write_bytes(pickle.dumps({"a": Malicious()}))
    for name in ("new.bin", "old.bin"):
        with pytest.raises(ValueError, match=name):
            load_lora_weights(unet, tmp_path / name)
    assert not (tmp_path / "executed").exists() and not lora_modules(unet)


NAME = "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


def changed(state, key, value):
    return state | {f"{NAME}.{key}": value}


def all_alphas(state, alpha):
    return {key: torch.tensor(alpha) if key.endswith(".alpha") else value for key, value in state.items()}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {k: v for k, v in s.items() if k != f"{NAME}.alpha"}, f"{NAME}.alpha is missing"),
        (lambda s: changed(s, "dora_scale", torch.ones(1)), f"{NAME}.dora_scale is not expected"),
        (lambda s: changed(s, "lora_up.weight", torch.ones(4, 24)), f"{NAME}.lora_up.weight has shape"),
        (lambda s: changed(s, "lora_down.weight", torch.ones(2, 16)), f"{NAME}.lora_down.weight has shape"),
        (lambda s: changed(s, "alpha", torch.tensor(9.0)), f"{NAME}.alpha is 9, 8 is expected"),
        (lambda s: changed(s, "alpha", torch.ones(2)), f"{NAME}.alpha has shape"),
        (
            lambda s: changed(s, "lora_up.weight", torch.full((24, 4), math.nan)),
            f"{NAME}.lora_up.weight has v",
        ),
        (lambda s: all_alphas(s, 2.5), "integers >= 1|is expected"),
        (lambda s: all_alphas(s, math.nan), "integers >= 1|finite"),
    ],
)
@pytest.mark.parametrize("injected", [False, True])
def test_a_file_that_does_not_fit_is_refused_by_file_and_key_and_changes_nothing(
    pristine_unet, unet, tmp_path, change, message, injected
):
    path = tmp_path / "odd.bin"
    torch.save(change(lora_state_dict(with_lora(pristine_unet), torch.float32)), path)
    if injected:
        unet = with_lora(pristine_unet, seed=8)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    with pytest.raises(ValueError, match=f"odd.bin: .*({message})"):
        load_lora_weights(unet, path)
    assert_same_tensors(unet.state_dict(), before)


def test_rank_or_alpha_other_than_the_injected_is_refused(pristine_unet, tmp_path):
    path = save_lora_weights(with_lora(pristine_unet, rank=4, alpha=8), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: .*lora_down.weight has shape .*rank 2"):
        load_lora_weights(with_lora(pristine_unet, rank=2, alpha=8), path)
    with pytest.raises(ValueError, match=r"a\.safetensors: .*alpha is 8, 4 is expected"):
        load_lora_weights(with_lora(pristine_unet, rank=4, alpha=4), path)
    merged = with_lora(pristine_unet, rank=4, alpha=8)
    merge_lora(merged)
    with pytest.raises(ValueError, match="merged"):
        load_lora_weights(merged, path)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100, "half", "a list"])
def test_an_unreadable_file_is_refused_by_name(pristine_unet, unet, tmp_path, suffix, content):
    path = tmp_path / f"broken{suffix}"
    if content == "half":
        save_lora_weights(with_lora(pristine_unet), path)
        content = path.read_bytes()[:5000]
    if content == "a list":
        torch.save([torch.ones(1)], path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"broken{suffix}"):
        load_lora_weights(unet, path)
    assert not lora_modules(unet)
