"""On a CUDA device: streams, graph capture, running statistics, the layers as they are used there."""

from __future__ import annotations

import copy
import subprocess
import sys

import layerwise_ext as lw
import pytest
import torch
from layerwise_ext._ops import _C
from torch import nn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


HEADS = {
    "pooled linear": lambda bins: lw.nn.PooledLinearHead(32, 10, bins),
    "predsim": lambda bins: lw.nn.PredSimHead(32, 10, bins),
    "predsim, projected": lambda bins: lw.nn.PredSimHead(32, 10, bins, project=True),
    "similarity of more samples than features": lambda _: lw.nn.SimilarityHead(32, 10),
    "contrastive": lambda bins: lw.nn.ContrastiveHead(32, bins),
    "goodness": lambda _: lw.nn.GoodnessHead(),
}


def stage(bins: tuple[int, int] = (4, 4), head: str = "pooled linear") -> lw.nn.LocalStage:
    torch.manual_seed(0)
    body = lw.nn.ConvBNReLU2d(16, 32, 3, padding=1)
    return lw.nn.LocalStage(body, HEADS[head](bins)).to("cuda")


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(8, 16, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    return x, torch.randint(0, 10, (8,), device="cuda")


def step(module: lw.nn.LocalStage, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    loss = module(x, target).loss
    assert loss is not None
    loss.backward()
    return loss.detach()


def test_stage_equals_the_cpu() -> None:
    module = stage()
    host = copy.deepcopy(module).cpu()
    x, target = data()
    loss, expected = step(module, x, target), step(host, x.cpu(), target.cpu())
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(module.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=2e-3, atol=2e-3 * theirs.grad.abs().max().item())
    for ours, theirs in zip(module.buffers(), host.buffers(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)


def test_runs_on_the_current_stream() -> None:
    module, (x, _) = stage(), data()
    expected = module.features(x).detach().clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        doubled = x * 1  # a kernel on another stream would read this before it is written
        actual = module.features(doubled).detach().clone()
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bins", [(4, 4), (3, 5)])  # cells that are alike, and cells that overlap
def test_capture_in_a_graph(bins: tuple[int, int]) -> None:
    """Nothing waits for the device; replays move running statistics and gradients as eager steps do."""
    module, (x, target) = stage(bins), data()
    eager = copy.deepcopy(module)
    static_x, static_target = x.clone(memory_format=torch.preserve_format), target.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(module, static_x, static_target)
            module.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(module, static_x, static_target)
    module.load_state_dict(eager.state_dict())
    for scale in (1.0, 2.0):
        static_x.copy_(x * scale)
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        graph.replay()
        eager.zero_grad(set_to_none=True)
        expected = step(eager, x * scale, target)
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(module.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
        for ours, theirs in zip(module.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)


def fit(kind: type[lw.train.Trainer], cuda_graph: bool, dtype: torch.dtype | None) -> tuple[lw.train.Trainer, list]:
    torch.manual_seed(0)
    images, target = torch.randn(220, 3, 16, 16), torch.randint(0, 4, (220,))
    model = lw.models.vgg([16, "M", 32], in_channels=3, num_classes=4, image_size=(16, 16), hidden=24, dim=128, seed=0)
    trainer = kind(
        model, device="cuda", autocast_dtype=dtype, seed=0, progress=False, cuda_graph=cuda_graph,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )  # fmt: skip
    batches = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, target), 32, pin_memory=True, num_workers=1
    )
    trainer.fit(batches, epochs=3)
    return trainer, [t.detach().float() for s in trainer.stages for t in s.state_dict().values()]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", [lw.train.LocalTrainer, lw.train.GreedyTrainer, lw.train.JointTrainer])
def test_trainers_in_graphs(kind: type[lw.train.Trainer], dtype: torch.dtype | None) -> None:
    """With Adam, a schedule, a loader that pins memory in a thread, and a last smaller batch."""
    _, expected = fit(kind, False, dtype)
    trainer, actual = fit(kind, True, dtype)
    assert trainer._captured is not None and trainer._captured.replays > 0
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype else {"rtol": 1e-3, "atol": 1e-4}
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("kind", [lw.train.LocalTrainer, lw.train.GreedyTrainer, lw.train.JointTrainer])
def test_trainers_in_float16(kind: type[lw.train.Trainer]) -> None:
    trainer, weights = fit(kind, False, torch.float16)
    assert all(t.isfinite().all() for t in weights)
    assert trainer.history[-1]["train_loss"][-1] < trainer.history[0]["train_loss"][0]
    assert trainer._scaler.get_scale() <= 2.0**16


@pytest.mark.parametrize("head", HEADS)
def test_a_stage_in_a_graph(head: str) -> None:
    module = stage(head=head)
    peer = copy.deepcopy(module)
    module.cuda_graph = True
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (module, peer)]
    full = 40 if "more samples" in head else 8
    for i, size in enumerate([full] * 6 + [5] + [full] * 2):
        torch.manual_seed(i)
        x = torch.randn(size, 16, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
        target = torch.randint(0, 2, (size,), device="cuda")
        losses = []
        for m, optimizer in zip((module, peer), optimizers, strict=True):
            losses.append(step(m, x, target))
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    assert module._captured is not None and module._captured.replays == 5
    for ours, theirs in zip(module.state_dict().values(), peer.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_random_numbers_differ_between_replays() -> None:
    module = stage()
    module.body = nn.Sequential(nn.Dropout(0.5), module.body)
    module.cuda_graph = True
    x, target = data()
    losses = [step(module, x, target).item() for _ in range(8)]
    assert module._captured is not None and module._captured.replays == 5
    assert len(set(losses)) == 8


def test_what_cannot_be_captured_says_so() -> None:
    """In a process of its own, for what a failed capture leaves behind; the device goes on to work there, too."""
    program = """
import layerwise_ext as lw, torch
from torch import nn

class Waits(nn.Module):
    def forward(self, x):
        return x * x.abs().max().item()

body = nn.Sequential(Waits(), lw.nn.ConvBNReLU2d(16, 32, 3))
stage = lw.nn.LocalStage(body, lw.nn.PooledLinearHead(32, 10), cuda_graph=True).cuda()
x, target = torch.randn(8, 16, 32, 32, device="cuda"), torch.randint(0, 10, (8,), device="cuda")
for _ in range(3):
    stage(x, target).loss.backward()
try:
    stage(x, target)
except RuntimeError as error:
    assert "cannot be captured in a CUDA graph" in str(error), error
else:
    raise AssertionError("captured")
torch.randn(4, device="cuda")
stage.cuda_graph = False
stage(x, target).loss.backward()
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_loss_that_stays_alive_does_not_keep_a_stage_from_being_captured() -> None:
    module = stage()
    module.cuda_graph = True
    kept = [module(*data())]
    for _ in range(7):
        kept[-1].loss.backward()
        kept.append(module(*data()))
    assert module._captured is not None and module._captured.replays == 5


FUSED = [f"cutlass sm90 {tile}x64 cluster 1x1" for tile in ("128x64", "128x128", "64x128", "64x64")]
FUSED += [f"cutlass sm90 {tile}x64 cluster 2x1" for tile in ("128x64", "128x128")]

# N, C_in, C_out, size, and options: whole tiles, pixels and channels that end inside a tile, an odd number of tiles
FUSED_CONVOLUTIONS = {
    "whole tiles": (8, 64, 128, 16, {"padding": 1}),
    "ragged": (3, 24, 72, 13, {"padding": 1}),
    "one tile": (1, 8, 8, 5, {"padding": 1}),
    "stride": (5, 32, 64, 15, {"stride": 2, "padding": 1}),
    "dilation": (2, 64, 64, 14, {"dilation": 2, "padding": 2}),
    "no padding": (3, 16, 192, 11, {}),
}


@pytest.mark.skipif(_C.build_info()["CUTLASS"].startswith("not in"), reason="a build without CUTLASS")
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="not a Hopper GPU"
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", FUSED_CONVOLUTIONS)
@pytest.mark.parametrize("kernel", FUSED)
def test_convolutions_that_sum(kernel: str, shape: str, dtype: torch.dtype) -> None:
    n, c_in, c_out, size, options = FUSED_CONVOLUTIONS[shape]
    torch.manual_seed(0)
    x = torch.randn(n, c_in, size, size, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(c_out, c_in, 3, 3, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)

    def run() -> tuple[torch.Tensor, ...]:
        mean, var = torch.zeros(c_out, device="cuda"), torch.zeros(c_out, device="cuda")
        y = lw.functional.conv_bn_act(
            x, w, None, mean, var, training=True, momentum=1.0, activation="identity", **options
        )
        return y.double(), mean.double(), var.double()

    z = nn.functional.conv2d(x.double(), w.double(), **options)
    exact_mean, exact_var = z.mean((0, 2, 3)), z.var((0, 2, 3))
    choices = lw.autotune.choices()
    lw.autotune.enable()
    try:
        lw.autotune.clear()
        run()
        (what,) = lw.autotune.choices()
        _C.set_autotune_choices({what: kernel})
        y, mean, var = run()
        assert lw.autotune.choices() == {what: kernel}  # of this build: not measured anew
    finally:
        lw.autotune.disable()
        _C.set_autotune_choices(choices)
    rounding = torch.finfo(dtype).eps
    expected = (z - exact_mean[:, None, None]) * (z.var((0, 2, 3), correction=0) + 1e-5).rsqrt()[:, None, None]
    torch.testing.assert_close(y, expected, rtol=4 * rounding, atol=8 * rounding)
    torch.testing.assert_close(mean, exact_mean, rtol=1e-5, atol=1e-5 * exact_var.max().sqrt().item())
    torch.testing.assert_close(var, exact_var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inference_is_one_kernel_after_the_fold(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = lw.nn.ConvBNReLU2d(16, 32, 3, padding=1, bias=True).to("cuda", dtype).eval()
    layer.bn.running_mean.normal_()
    layer.bn.running_var.uniform_(0.5, 2.0)
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(4, 16, 9, 9, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    plain = nn.Sequential(*copy.deepcopy(layer).double().to_modules())
    rubbish = torch.full((4, 32, 9, 9), float("nan"), device="cuda", dtype=dtype)
    del rubbish  # cuDNN's kernel adds a map times 0: its memory must not matter
    with torch.no_grad():
        y = layer(x)
        expected = plain(x.double())
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    conv, bn, _ = plain
    scale = (bn.weight / (bn.running_var + bn.eps).sqrt()).abs()[:, None, None]
    terms = scale * nn.functional.conv2d(x.double().abs(), conv.weight.abs(), conv.bias.abs(), padding=1)
    limit = 8 * torch.finfo(dtype).eps * terms.max()  # roundings are relative to what is summed
    assert (y.double() - expected).abs().max() <= limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    module, (x, target) = stage(), data()
    with torch.autocast("cuda", dtype):
        output = module(x, target)
    assert output.features.dtype == dtype and output.loss is not None
    output.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_a_map_that_is_not_aligned() -> None:
    values = torch.randn(2, 8, 6, 6, device="cuda").contiguous(memory_format=torch.channels_last)
    shifted = torch.empty(values.numel() + 1, device="cuda")[1:].as_strided(values.shape, values.stride())
    shifted.copy_(values)
    actual, expected = (lw.functional.bn_act_moments(z, training=True, bins=2) for z in (shifted, values))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_two_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    z = torch.randn(2, 8, 6, 6, device="cuda:1")
    y = lw.functional.bn_act_moments(z, training=True).y
    torch.testing.assert_close(y, nn.functional.relu(nn.functional.batch_norm(z, None, None, training=True)))


def test_tensors_on_different_devices_are_named() -> None:
    z = torch.randn(2, 8, 6, 6, device="cuda")
    with pytest.raises(RuntimeError, match=r"weight must be on the device of the map, cuda:0, got cpu"):
        lw.functional.bn_act_moments(z, weight=torch.ones(8), training=True)
