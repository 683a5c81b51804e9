"""Whether `lw.fuse_` changes what models of torchvision and timm compute: an epoch on digits in float64, step by step.

    python benchmarks/library_models.py                         seven models of torchvision: half an hour
    python benchmarks/library_models.py --models timm:resnet18  others, of both libraries
    python benchmarks/library_models.py --quick                 ResNet-18, three small steps: shows that it runs

*From the same state*: before each step of the original's training the fused model gets its state_dict, and both run
that step.  Loss, outputs, gradients and running statistics have to agree within 1e-10, at every step.

*Alone*: the fused model trains by itself, and the loss curves are compared.  Deep networks carry roundings on, up to
tenfold per step, so that the curves of any two programs part.  The control is the original once more, with weights
moved by 1e-14 of themselves: the fused model may part by ten times as much as the control does, or by 1e-10.

Further: outputs in evaluation mode, the state_dict both ways, and `lw.unfuse_`, which gives the original back.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import layerwise_ext as lw
import torch
from harness import RESULTS, environment, write_json
from layerwise_ext import _C, data
from torch import Tensor, nn
from torch.nn import functional as F

# Longest first
MODELS = (
    "vgg16_bn", "resnet50", "densenet121", "resnet18", "efficientnet_b0", "mobilenet_v2", "regnet_y_400mf",
)  # fmt: skip
TOLERANCE = 1e-10  # of all that is computed from the same state
CONTROL = 10  # times as far as the control may the fused model part
MOVED = 1e-14
BATCH, QUICK_BATCH, QUICK_STEPS = 64, 8, 3
SGD = {"lr": 0.002, "momentum": 0.9}
NUM_CLASSES = 10
TIMM = "timm:"

_operators: list[torch.library.Library] = []  # lives as long as what it defines


class Unavailable(Exception):
    """A library or a model that is not there; the message says what to do."""


# -- Libraries ---------------------------------------------------------------------------------------------------------


def torchvision() -> Any:
    """torchvision, even where its operators were built for another torch: it does not import then, and no model of
    it needs them."""
    try:
        import torchvision
    except ImportError as error:
        raise Unavailable("torchvision is not installed: pip install torchvision") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _operators.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):  # those that the import asks for
            _operators[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


def library(name: str) -> tuple[str, str]:
    """Library of the model, and its version.

    Raises:
        Unavailable: the library is not installed or has no such model.
    """
    vision = torchvision()  # timm imports it, too
    if not name.startswith(TIMM):
        found, known = vision, name in vision.models.list_models()
    else:
        try:
            import timm
        except ImportError as error:
            raise Unavailable("timm is not installed: pip install timm") from error
        found, known = timm, timm.is_model(name.removeprefix(TIMM))
    if not known:
        raise Unavailable(f"model is {name!r}; allowed: NAME of a model of torchvision, timm:NAME of one of timm")
    return found.__name__, found.__version__


def build(name: str) -> nn.Module:
    """The same parameters each time, float64."""
    vision = torchvision()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if not name.startswith(TIMM):
            return vision.models.get_model(name, num_classes=NUM_CLASSES).double()
        import timm

        return timm.create_model(name.removeprefix(TIMM), num_classes=NUM_CLASSES).double()


# -- Steps -------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    images: Tensor  # [N, 3, 32, 32], float64
    labels: Tensor  # [N]

    @classmethod
    def of(cls, digits: data.Split, indices: Tensor) -> Batch:
        images = F.interpolate(digits.images[indices].double() / 255, scale_factor=4)
        return cls(images.expand(-1, 3, -1, -1).contiguous(), digits.labels[indices])


def epoch(quick: bool) -> list[Batch]:
    """Shuffled training images of digits; of the quick run a few."""
    digits = data.load("digits")
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(1))
    indices = order.split(QUICK_BATCH)[:QUICK_STEPS] if quick else order.split(BATCH)
    return [Batch.of(digits, i) for i in indices]


class Step(NamedTuple):
    """What a training step leaves beside the gradients of the parameters and the running statistics."""

    loss: Tensor
    output: Tensor
    input_gradient: Tensor


def training_step(model: nn.Module, batch: Batch, seed: int) -> Step:
    """Forward, cross-entropy, backward; ``seed`` is for dropout and the like."""
    images = batch.images.clone().requires_grad_()
    model.train().zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model(images)
    loss = F.cross_entropy(output, batch.labels)
    loss.backward()
    assert images.grad is not None
    return Step(loss.detach(), output.detach(), images.grad)


def largest(values: Iterable[float]) -> float:
    """NaN where one is."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


def relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest expected value."""
    difference = largest((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    return difference / largest(b.abs().max().item() for b in expected) if difference else 0.0


def by_module(fused: nn.Module, original: nn.Module, tensors: Callable[[nn.Module], list[Tensor]]) -> float:
    """The largest difference, relative to the largest value in its module.

    By itself a tensor can be zero but for roundings: the gradient of a bias before a batch norm, the running mean of a
    convolution of normalised maps.
    """
    pairs = ((tensors(fused.get_submodule(name)), tensors(module)) for name, module in original.named_modules())
    return largest(relative(found, expected) for found, expected in pairs if expected)


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters(recurse=False)]


def statistics(module: nn.Module) -> list[Tensor]:
    return [b for b in module.buffers(recurse=False) if b.is_floating_point()]


def differences(fused: nn.Module, step: Step, original: nn.Module, expected: Step) -> dict[str, float]:
    return {
        "loss": relative([step.loss], [expected.loss]),
        "outputs": relative([step.output], [expected.output]),
        "parameter_gradients": by_module(fused, original, gradients),
        "input_gradient": relative([step.input_gradient], [expected.input_gradient]),
        "running_statistics": by_module(fused, original, statistics),
    }


class Training(NamedTuple):
    losses: list[float]
    differences: list[dict[str, float]]  # per step, empty without a follower


def train(model: nn.Module, batches: Sequence[Batch], follower: nn.Module | None = None) -> Training:
    """An epoch; the follower gets the model's state before each step, and runs it, too."""
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    result = Training([], [])
    for seed, batch in enumerate(batches):
        if follower is not None:
            follower.load_state_dict(model.state_dict())
        step = training_step(model, batch, seed)
        if follower is not None:
            result.differences.append(differences(follower, training_step(follower, batch, seed), model, step))
        optimizer.step()
        result.losses.append(step.loss.item())
    return result


# -- What is compared --------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(original: nn.Module, fused: nn.Module, images: Tensor) -> float:
    """Difference of the outputs in evaluation mode, from the same state."""
    fused.load_state_dict(original.state_dict())
    return relative([fused.eval()(images)], [original.eval()(images)])


def exchangeable(original: nn.Module, fused: nn.Module) -> bool:
    """Whether each takes the other's state_dict, strictly, and they have the same keys and values then."""
    original.load_state_dict(fused.state_dict())
    fused.load_state_dict(original.state_dict())
    a, b = original.state_dict(), fused.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
def gives_back(original: nn.Module, fused: nn.Module, count: int, images: Tensor) -> bool:
    """Whether unfuse_ leaves the original's classes without hooks, and its very outputs."""
    modules = list(fused.modules())
    return (
        lw.unfuse_(fused) == count
        and [type(m) for m in modules] == [type(m) for m in original.modules()]
        and not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        and torch.equal(fused.eval()(images), original.eval()(images))
    )


def fused_model(name: str) -> tuple[nn.Module, lw.fuse.FuseReport]:
    model = build(name)
    return model, lw.fuse_(model)


def measure(name: str, quick: bool) -> dict[str, Any]:
    """Two models at a time: a VGG-16 in training takes 3 GiB."""
    batches = epoch(quick)
    original, (fused, report) = build(name), fused_model(name)
    training = train(original, batches, follower=fused)
    test = Batch.of(data.load("digits", split="test"), torch.arange(QUICK_BATCH if quick else BATCH)).images
    entry: dict[str, Any] = {
        "model": name,
        "convolutions": len(report.fused) + len(report.skipped),
        "fused": len(report.fused),
        "steps": len(batches),
        "same_state": {key: [step[key] for step in training.differences] for key in training.differences[0]},
        "evaluation": evaluate(original, fused, test),
        "state_dict": exchangeable(original, fused),
        "unfused": gives_back(original, fused, len(report.fused), test),
    }
    del original, fused
    control = build(name)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in control.parameters():
            p.mul_(1 + MOVED * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    curves = {"original": training.losses, "control": train(control, batches).losses}
    del control
    curves["fused"] = train(fused_model(name)[0], batches).losses
    parting = {
        key: largest(abs(a - b) / b for a, b in zip(curves[key], training.losses, strict=True))
        for key in ("fused", "control")
    }
    entry |= {"curves": curves, "parting": parting}
    print(describe(entry), flush=True)
    return entry


def faults(entry: dict[str, Any]) -> list[str]:
    """What does not hold."""
    same = {key: largest(values) for key, values in entry["same_state"].items()}
    same["outputs in evaluation mode"] = entry["evaluation"]
    found = [f"{key.replace('_', ' ')} differ by {v:.1e}" for key, v in same.items() if not v <= TOLERANCE]
    own, control = entry["parting"]["fused"], entry["parting"]["control"]
    if not own <= max(CONTROL * control, TOLERANCE):
        found.append(f"its loss curve parts by {own:.1e}, the control's by {control:.1e}")
    if not entry["state_dict"]:
        found.append("the state_dict does not go both ways")
    if not entry["unfused"]:
        found.append("unfuse_ does not give the original back")
    return found


def describe(entry: dict[str, Any]) -> str:
    same = ", ".join(f"{key.replace('_', ' ')} {largest(values):.1e}" for key, values in entry["same_state"].items())
    parting = entry["parting"]
    return (
        f"{entry['model']}, {entry['fused']} of {entry['convolutions']} convolutions fused: from the same state at "
        f"{entry['steps']} steps: {same}; evaluation {entry['evaluation']:.1e}; alone the loss curve parts by "
        f"{parting['fused']:.1e}, the control's by {parting['control']:.1e}"
    )


# -- The command -------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Models of torchvision and timm, lw.fuse_ against none, in float64.")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="of torchvision, or timm:NAME of timm")
    parser.add_argument("--quick", action="store_true", help="three steps, by default of resnet18 alone")
    parser.add_argument("--processes", type=int, default=1, help="models at a time, each with a share of the threads")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    arguments = parser.parse_args(argv)
    if arguments.processes < 1:
        parser.error(f"--processes is {arguments.processes}; allowed: 1 or more")
    arguments.models = arguments.models or (["resnet18"] if arguments.quick else list(MODELS))
    arguments.complete = not arguments.quick and set(MODELS) <= set(arguments.models)
    name = "library_models-cpu" if arguments.complete else "library_models-cpu-partial"
    arguments.output = arguments.output or RESULTS / f"{name}.json"
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        libraries = dict(library(name) for name in arguments.models)
        epoch(quick=True)
    except (Unavailable, data.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    settings = {
        "complete": arguments.complete,
        "tolerance": TOLERANCE,
        "control": {"moved": MOVED, "factor": CONTROL},
        "batch": QUICK_BATCH if arguments.quick else BATCH,
        "sgd": SGD,
    }
    result: dict[str, Any] = {"benchmark": "library_models", **environment(), "settings": settings}
    result["machine"]["layerwise_cpu_capability"] = _C.cpu_capability()
    result["versions"] |= {"layerwise_ext": lw.__version__, **libraries}
    run = functools.partial(measure, quick=arguments.quick)
    if arguments.processes == 1:
        result["models"] = [run(name) for name in arguments.models]
    else:
        share = max(1, torch.get_num_threads() // arguments.processes)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.processes, context, torch.set_num_threads, (share,)) as pool:
            result["models"] = list(pool.map(run, arguments.models))
    found = [f"{entry['model']}: {fault}" for entry in result["models"] for fault in faults(entry)]
    for fault in found:
        print(f"error: {fault}", file=sys.stderr)
    if found:
        return 1
    write_json(arguments.output, result)
    print(f"written: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
