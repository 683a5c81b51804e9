"""Times whole networks that `lw.fuse_` was applied to, training and inference, against eager PyTorch and torch.compile.

    python benchmarks/bench_model.py            ResNet-18, ResNet-50, VGG8b, fp32 and bf16
    python benchmarks/bench_model.py --quick    narrow networks and few rounds: shows that it runs

A training step is forward, cross-entropy, backward; no optimizer.  Inference is a forward pass in evaluation mode,
under `torch.inference_mode`; `folded` is eager with batch norm folded into the convolutions beforehand.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import layerwise_ext as lw
import networks
import torch
import torch._dynamo
from harness import RESULTS, Quartiles, Sampling, environment, interleave, ratios, write_json
from layerwise_ext import _C
from peers import DTYPES, Step, use_channels_last
from resnet import ResNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

OURS, EAGER, FOLDED, COMPILE = "fuse_", "eager channels_last", "folded channels_last", "compile"
FULL = Sampling(warmup=2, min_rounds=7, max_rounds=40, seconds=25.0)
QUICK = Sampling(warmup=1, min_rounds=3, max_rounds=3, seconds=1.0)


class Case(NamedTuple):
    """``mode`` is ``'train'`` or ``'infer'``; ``width`` a factor."""

    network: str
    mode: str
    batch: int
    size: int
    width: float = 1.0

    def __str__(self) -> str:
        return f"{self.network} {self.mode} {self.batch} x {self.size}x{self.size}"

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.network != "vgg8b":
                return ResNet(self.network, int(64 * self.width))
            stages = networks.Case(self.batch, self.width).fused("pred")
            joint = networks.PlainJoint([networks.PlainStage(stage) for stage in stages])
            return nn.Sequential(joint.bodies, joint.linear)


CASES = (
    Case("resnet18", "train", 32, 96),
    Case("resnet50", "train", 16, 96),
    Case("vgg8b", "train", 64, 32),
    Case("resnet18", "infer", 32, 224),
    Case("resnet50", "infer", 1, 224),
    Case("resnet50", "infer", 32, 224),
    Case("vgg8b", "infer", 64, 32),
)
QUICK_CASES = (Case("resnet18", "train", 2, 32, 0.25), Case("resnet50", "infer", 1, 32, 0.25))
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}  # of outputs against eager, in their norm


def folded(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode without its batch norms, each of which is the next sibling of its convolution."""
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        previous: tuple[str, nn.Module] | None = None
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) and previous and isinstance(previous[1], nn.Conv2d):
                setattr(module, previous[0], fuse_conv_bn_eval(previous[1], child))
                setattr(module, name, nn.Identity())
            previous = name, child
    return model


def contestants(case: Case, dtype: torch.dtype, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Each runs one step and returns its output, of a training step its loss."""
    x = torch.randn(case.batch, 3, case.size, case.size, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    target = torch.arange(case.batch) % 10
    plain = case.model().train(case.mode == "train")
    use_channels_last(plain)
    fused = copy.deepcopy(plain)
    lw.fuse_(fused)
    models: dict[str, Callable[[Tensor], Tensor]] = {OURS: fused, EAGER: plain}
    if compiled:
        models[COMPILE] = torch.compile(copy.deepcopy(plain), dynamic=False)
    if case.mode == "infer":
        models[FOLDED] = folded(plain)

    def step(forward: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def train() -> Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(forward(x), target)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        def infer() -> Tensor:
            with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return forward(x)

        return train if case.mode == "train" else infer

    return {name: step(forward) for name, forward in models.items()}


def measure(case: Case, dtype: str, sampling: Sampling, compiled: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    runs = contestants(case, DTYPES[dtype], compiled)
    expected = runs[EAGER]().double()
    differences = {name: ((run().double() - expected).norm() / expected.norm()).item() for name, run in runs.items()}
    if not differences[OURS] <= TOLERANCE[dtype]:
        raise RuntimeError(f"{dtype} {case}: fuse_ differs from eager PyTorch by {differences[OURS]:.2g}")
    # The gradients of a run go into those of the run before, which takes the same time for all.
    times = interleave({name: Step(run, lambda: None) for name, run in runs.items()}, sampling)
    return {
        "case": case._asdict(),
        "dtype": dtype,
        "differences": differences,
        "rounds": len(times[OURS]),
        "milliseconds": {name: Quartiles.of(1e3 * t for t in seconds).as_dict() for name, seconds in times.items()},
        "ratio": {name: ratios(times[name], times[OURS]).as_dict() for name in runs if name != OURS},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whole networks with lw.fuse_, against PyTorch, on the CPU.")
    parser.add_argument("--quick", action="store_true", help="narrow networks, few rounds")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--networks", nargs="+", choices=("resnet18", "resnet50", "vgg8b"))
    parser.add_argument("--modes", nargs="+", choices=("train", "infer"), default=["train", "infer"])
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    arguments = parser.parse_args(argv)
    cases = [c for c in (QUICK_CASES if arguments.quick else CASES) if c.mode in arguments.modes]
    cases = [c for c in cases if arguments.networks is None or c.network in arguments.networks]
    complete = (
        not arguments.quick and arguments.compile and len(cases) == len(CASES) and arguments.dtypes == list(DTYPES)
    )
    output = arguments.output or RESULTS / f"bench_model-cpu{'' if complete else '-partial'}.json"
    result: dict[str, Any] = {"benchmark": "bench_model", **environment(), "settings": {"complete": complete}}
    result["machine"]["layerwise_cpu_capability"] = _C.cpu_capability()
    result["versions"]["layerwise_ext"] = lw.__version__
    result["cases"] = []
    for case in cases:
        for dtype in arguments.dtypes:
            entry = measure(case, dtype, QUICK if arguments.quick else FULL, arguments.compile)
            result["cases"].append(entry)
            own = entry["milliseconds"][OURS]["median"]
            others = ", ".join(f"{name} {r['median']:.2f}x" for name, r in entry["ratio"].items())
            print(f"{dtype} {case}: {own:.1f} ms; {others} as long", flush=True)
    write_json(output, result)
    print(f"written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
