"""Passes as CUDA graphs: the same step. Without a GPU a recording is played by calling what was recorded."""

import pytest
import torch
from test_model import CPU, build

import train_manga_lora as trainer
from dataset import MangaFaceDataset
from training import denoising, graphs, memory
from training.encoding import EncodedDataset


class Played:
    """Stands for a CUDA graph: reads where its inputs lie, writes where its results lie."""

    def __init__(self, function, inputs):
        self.function, self.played = function, 0
        self.places = [x.clone() if torch.is_tensor(x) else x for x in inputs]
        self.results = [torch.full_like(result, torch.nan) for result in function(*self.places)]

    def replay(self):
        self.played += 1
        for kept, result in zip(self.results, self.function(*self.places), strict=True):
            kept.copy_(result)


@pytest.fixture
def recordings(monkeypatch):
    """All that is recorded, as it is played."""
    made = []

    def record(self, inputs):
        made.append(played := Played(self.function, inputs))
        return played, played.places, played.results

    monkeypatch.setattr(graphs.Graphed, "_record", record)
    return made


@pytest.fixture
def parts(tiny_base, shared_faces):
    """A model in float64 whose LoRA is not zero, and what it learns from."""
    config = trainer.TrainingConfig(lora_rank=4, lora_alpha=8)
    model = build(tiny_base, config, torch.float64, micro_batch=3)
    torch.nn.init.normal_(model.weights, std=0.1)
    model.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    dataset = MangaFaceDataset(shared_faces, shared_faces / "modified_face_250.json", 64, num_workers=0)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(len(dataset.faces), 4, 8, 8, generator=generator, dtype=torch.float64)
    texts = torch.randn(len(dataset.texts), 77, 16, generator=generator, dtype=torch.float64)
    return model, dataset, EncodedDataset(torch.stack((mean, mean * 0.1), 1), texts, CPU)


def loss_and_gradient(parts, step, graphed=None, count=8):
    model, dataset, encoded = parts
    batch = denoising.draw_batch(dataset, range(count), 0, step, (4, 8, 8), 1000, 0.1)
    model.weights.grad.zero_()
    share = torch.arange(count)
    loss = denoising.accumulate_gradients(model.unet, model.scheduler, encoded, batch, share, 3, model.scaler, graphed)
    return loss.item(), model.weights.grad.clone()


def test_recorded_passes_give_the_eager_gradient_and_rests_are_not_recorded(parts, recordings):
    model = parts[0]
    graphed = graphs.GraphedPass(model.unet, model.scheduler, model.scaler, model.weights)
    for step, count in ((0, 8), (1, 8), (2, 4), (3, 8)):  # windows of 3, 3, 2 images, and of 3, 1
        loss, gradient = loss_and_gradient(parts, step, graphed, count)
        expected_loss, expected = loss_and_gradient(parts, step, None, count)
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert (gradient - expected).norm() <= 1e-12 * expected.norm()
    assert [played.played for played in recordings] == [6, 1]  # one per number of images in the batch
    with torch.no_grad():
        model.weights.mul_(2)  # a recording reads the weights where they lie
    torch.testing.assert_close(loss_and_gradient(parts, 4, graphed)[1], loss_and_gradient(parts, 4)[1])


def test_what_cannot_be_recorded_is_computed_as_ever_and_said(parts):
    model, told = parts[0], []
    graphed = graphs.GraphedPass(model.unet, model.scheduler, model.scaler, model.weights, told.append)
    for step in range(2):  # torch without CUDA refuses
        torch.testing.assert_close(loss_and_gradient(parts, step, graphed), loss_and_gradient(parts, step))
    assert len(told) == 1 and "can't be recorded" in told[0] and graphed.graphed.failure in told.pop()
    model.plans.can_be_graphed, model.plans.log = True, told.append
    batch = denoising.draw_batch(parts[1], range(8), 0, 0, (4, 8, 8), 1000, 0.1)
    trainer.rehearse(model, parts[2], batch, torch.arange(8))
    assert len(told) == 1 and "can't be recorded" in told[0]


@pytest.mark.parametrize(
    "checkpointing, free, fits",
    [("nothing", 3.1, True), ("cheap", 3.1, True), ("nothing", 2.9, False), ("largest", 99, False), ("all", 99, False)],
)
def test_passes_are_recorded_where_memory_is_plenty_and_no_block_is_checkpointed(checkpointing, free, fits):
    assert memory.leaves_room_for_graphs(memory.MemoryPlan(8, checkpointing, 1.0), free) == fits


def test_a_recording_is_let_go_when_memory_runs_out(parts, recordings):
    model, dataset, encoded = parts
    plans = [memory.MemoryPlan(size, "nothing", size) for size in (8, 4)]
    model.plans = memory.Plans(model.unet, plans, plans[0], lambda text: None)
    model.plans.can_be_graphed = True
    batch, share = denoising.draw_batch(dataset, range(8), 0, 0, (4, 8, 8), 1000, 0.1), torch.arange(8)
    trainer.rehearse(model, encoded, batch, share)
    assert model.graphed and len(recordings) == 1
    model.plans.step_down(CPU)
    trainer.rehearse(model, encoded, batch, share)
    assert model.graphed is None and len(recordings) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_a_replayed_graph_gives_what_its_function_gives():
    weight = torch.randn(64, 64, device="cuda", requires_grad=True)

    def function(x, power):
        loss = (x @ weight).abs().pow(power).mean()
        return loss.detach(), *torch.autograd.grad(loss, [weight])

    graphed = graphs.Graphed(function)
    for power, rows in ((1, 8), (2, 8), (2, 5), (1, 8)):
        x = torch.randn(rows, 64, device="cuda")
        torch.testing.assert_close(tuple(graphed(x, power)), function(x, power))
    assert not graphed.failure and len(graphed.recordings) == 3
