"""Batch norm over replicas: two processes with parts of a batch against one with all of it, in float64."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layerwise_ext import functional
from layerwise_ext.nn import ConvBNReLU2d, LocalStage, PooledLinearHead, revert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
PARTS = {"even": (4, 4), "uneven": (3, 5), "one sample of one pixel": (1, 7)}


def values(size: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    random = {
        "z": torch.randn(8, 6, size, size, generator=g, dtype=torch.float64),
        "residual": torch.randn(8, 6, size, size, generator=g, dtype=torch.float64),
        "weight": torch.rand(6, generator=g, dtype=torch.float64) + 0.5,
        "bias": torch.randn(6, generator=g, dtype=torch.float64),
        "slope": torch.rand(6, generator=g, dtype=torch.float64),
    }
    return {name: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for name, t in random.items()}


def moments(samples: slice, size: int, group: Any) -> dict[str, Tensor]:
    """Results for some samples; gradients of parameters are of these samples alone."""
    leaves = {k: (v[samples] if v.dim() == 4 else v.clone()).requires_grad_() for k, v in values(size).items()}
    running = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    options: dict[str, Any] = {"activation": "prelu", "downsample": ("max", 2) if size > 1 else None, "bins": 1}
    z = leaves.pop("z")
    y, m1, m2 = functional.bn_act_moments(z, *running, training=True, process_group=group, **leaves, **options)
    (y.square().sum() + (m1**3).sum() + m2.sum()).backward()
    grads = {f"d{k}": v.grad for k, v in leaves.items()}
    return {"y": y.detach(), "dz": z.grad, "mean": running[0], "var": running[1], **grads}


def layer(group: Any = None) -> nn.Module:
    torch.manual_seed(0)
    common: dict[str, Any] = {"padding": 1, "dtype": torch.float64, "process_group": group}
    body = nn.Sequential(
        ConvBNReLU2d(6, 8, 3, bias=True, downsample=("avg", 2), **common),
        ConvBNReLU2d(8, 8, 3, activation="silu", momentum=None, **common),
    )
    return LocalStage(body, PooledLinearHead(8, 3, bins=2, dtype=torch.float64))


def train(module: nn.Module, samples: slice) -> dict[str, Tensor]:
    """Sums of gradients over the samples, and running statistics, after two steps."""
    x, target = values(8)["z"][samples], (torch.arange(8) % 3)[samples]
    for _ in range(2):
        module.zero_grad()
        loss = module(x, target).loss * len(x)
        loss.backward()
    return {k: v.clone() for k, v in module.named_buffers()} | {k: p.grad for k, p in module.named_parameters()}


def worker(rank: int, folder: str, parts: tuple[int, int], size: int) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        samples = slice(0, parts[0]) if rank == 0 else slice(parts[0], None)
        results: dict[str, Any] = {"moments": moments(samples, size, dist.group.WORLD)}
        with pytest.raises(TypeError, match=r"process_group is str; allowed: a torch\.distributed\.ProcessGroup"):
            functional.bn_act_moments(values(8)["z"], training=True, process_group="WORLD")
        if size > 1:
            results["ddp"] = train(DistributedDataParallel(layer(dist.group.WORLD)), samples)
            stage = nn.SyncBatchNorm.convert_sync_batchnorm(layer())  # which DDP takes on CUDA only
            results["train"] = train(stage, samples)
            plain = revert_sync_batchnorm(stage)
            assert not any(isinstance(m, nn.SyncBatchNorm) for m in plain.modules())
            results["state"] = plain.state_dict()
            results["eval"] = stage.eval().features(values(8)["z"]).detach()
        torch.save(results, f"{folder}/{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise


def run(folder: Path, parts: tuple[int, int], size: int) -> list[dict[str, Any]]:
    context = mp.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, str(folder), parts, size)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not errors, "\n".join(errors)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("parts", "size"), [("even", 8), ("uneven", 6), ("one sample of one pixel", 1)])
def test_equal_to_one_process_on_the_whole_batch(parts: str, size: int, tmp_path: Path) -> None:
    replicas = run(tmp_path, PARTS[parts], size)
    whole = moments(slice(None), size, None)
    for name, expected in whole.items():
        pieces = [replica["moments"][name] for replica in replicas]
        if name in ("y", "dz", "dresidual"):
            actual = torch.cat(pieces)
        elif name in ("mean", "var"):
            assert torch.equal(*pieces)
            actual = pieces[0]
        else:
            actual = pieces[0] + pieces[1]
        torch.testing.assert_close(actual, expected, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    if size == 1:
        return
    stage = layer()
    expected = train(stage, slice(None))
    for name, value in expected.items():
        own, other = (replica["train"][name] for replica in replicas)
        averaged = replicas[0]["ddp"][f"module.{name}"]
        if "running" in name or "tracked" in name:
            assert torch.equal(own, other)
            torch.testing.assert_close([own, averaged], [value, value], **TOLERANCE)
        else:
            torch.testing.assert_close([own + other, 2 * averaged], [value, value], **TOLERANCE)
    assert replicas[0]["state"].keys() == stage.state_dict().keys()
    torch.testing.assert_close(replicas[0]["eval"], stage.eval().features(values(8)["z"]).detach(), **TOLERANCE)


def test_without_processes_a_converted_layer_is_a_plain_one() -> None:
    stage, peer = nn.SyncBatchNorm.convert_sync_batchnorm(layer()), layer()
    assert any(isinstance(m, nn.SyncBatchNorm) for m in stage.modules())
    torch.testing.assert_close(train(stage, slice(None)), train(peer, slice(None)), **TOLERANCE)
    alone = revert_sync_batchnorm(nn.SyncBatchNorm(3))
    assert type(alone) is nn.BatchNorm2d
