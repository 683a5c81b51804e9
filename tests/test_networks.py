"""Residual and plain networks, schedules of downsampling, what networks cost, and cutting them into stages."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import layerwise_ext as lw
import pytest
import torch
from fuse_models import BasicBlock
from layerwise_ext.models import StagedModel, cnn, resnet, split, summary, vgg
from layerwise_ext.models.schedule import one_earlier, positions
from layerwise_ext.nn import ConvBNReLU2d, FusedChain, LocalStage, ModuleHead, PooledLinearHead, SimilarityHead
from layerwise_ext.train import LocalTrainer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SMALL: dict[str, Any] = {"width": 8, "num_classes": 4, "image_size": (16, 16), "seed": 0}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- Residual networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "stem", "classes", "parameters"),
    [
        ("resnet18", "imagenet", 1000, 11_689_512),
        ("resnet34", "imagenet", 1000, 21_797_672),
        ("resnet50", "imagenet", 1000, 25_557_032),
        ("resnet101", "imagenet", 1000, 44_549_160),
        ("resnet152", "imagenet", 1000, 60_192_808),
        # The paper's 0.27 and 1.7 million and two projections.
        ("resnet20", "cifar", 10, 269_722 + 2_752),
        ("resnet110", "cifar", 10, 1_727_962 + 2_752),
    ],
)
def test_parameter_counts_of_residual_networks(config: str, stem: str, classes: int, parameters: int) -> None:
    model = resnet(config, stem=stem, num_classes=classes, image_size=(64, 64), width_multiplier=1)
    assert count(model.backbone()) == parameters
    blocks = len(model) - 1
    layers = blocks * (3 if parameters > 25_000_000 else 2) + 2
    assert config == f"resnet{layers}"


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_fused_and_plain_residual_networks_are_the_same(block: str, stem: str) -> None:
    options = {**SMALL, "block": block, "stem": stem, "image_size": (32, 32), "activation": "leaky_relu"}
    fused, plain = resnet((1, 2), **options), resnet((1, 2), **options, fused=False)
    assert any(isinstance(m, ConvBNReLU2d) for m in fused.modules())
    assert not any(isinstance(m, ConvBNReLU2d) for m in plain.modules())
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), plain.parameters(), strict=True))
    for model in (fused, plain):
        torch.manual_seed(0)
        nn.init.normal_(model[-1].head.linear.weight)
        model.double()
    x, target = torch.rand(3, 3, 32, 32, dtype=torch.float64), torch.arange(3)
    torch.testing.assert_close(fused(x), plain(x))
    for stage, peer in zip(fused, plain, strict=True):
        y, loss, _ = stage(x, target)
        _, expected, _ = peer(x, target)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        for p, q in zip(stage.parameters(), peer.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)
        x = y
    plain.backbone().load_state_dict(fused.backbone_state_dict())


def test_the_output_of_a_residual_network_is_the_mean_over_the_map() -> None:
    model = resnet((1, 1), **SMALL)
    assert model[-1].head.bins == (1, 1)
    assert model[0].head.bins == (8, 16)  # 8 channels times 128 cells
    assert resnet((1, 1), **SMALL, bins=2)[-1].head.bins == (2, 2)
    assert type(resnet((1, 1), **SMALL, head="similarity")[-1].head) is PooledLinearHead


# -- Schedules ---------------------------------------------------------------------------------------------------------


def resolutions(model: StagedModel, size: tuple[int, int, int]) -> list[int]:
    """Width of every unit's map."""
    return [layer.shape[2] for layer in summary(model, size).layers]


def test_schedules_by_name() -> None:
    assert one_earlier([2, 4, 5, 6]) == (1, 3, 4, 5)
    assert one_earlier([1, 2, 3]) == (0, 1, 2)
    assert one_earlier([0, 1]) == (0, 1)  # the input stands in the way
    assert positions("standard", [3, 5], [0, 3], 9) == (3, 5)
    assert positions("accelerated", [3, 5], [0, 3], 9) == (0, 3)
    assert positions([0, 8], [3, 5], [0, 3], 9) == (0, 8)


@pytest.mark.parametrize("schedule", ["standard", "accelerated", [0, 2]])
def test_vgg_keeps_its_layers_and_final_resolution(schedule: Any) -> None:
    options: dict[str, Any] = {"in_channels": 1, "image_size": (16, 16), "hidden": None, "seed": 0}
    model = vgg([8, 8, "M", 16, "M", 16], **options, downsampling=schedule)
    assert [stage.body[-1].conv.out_channels if isinstance(stage.body, nn.Sequential) else stage.body.conv.out_channels
            for stage in model] == [8, 8, 16, 16]  # fmt: skip
    expected = {"standard": [16, 16, 8, 4], "accelerated": [16, 8, 4, 4]}
    assert resolutions(model, (1, 16, 16)) == expected.get(str(schedule), [8, 8, 4, 4])
    assert model.downsampling == {"standard": (2, 3), "accelerated": (1, 2)}.get(str(schedule), (0, 2))
    assert count(model.backbone()) == count(vgg([8, 8, "M", 16, "M", 16], **options).backbone())


def test_resnet_moves_its_strides() -> None:
    standard, accelerated = (resnet((1, 2, 1), **SMALL, downsampling=name) for name in ("standard", "accelerated"))
    first_of_units = [[s.body.conv if i == 0 else s.body.body[0].conv for i, s in enumerate(m)] for m in
                      (standard, accelerated)]  # fmt: skip
    assert [[conv.stride[0] for conv in convs] for convs in first_of_units] == [[1, 1, 2, 1, 2], [2, 1, 2, 1, 1]]
    x = torch.rand(2, 3, 16, 16)
    for model in (standard, accelerated):
        features = x
        for stage in model:
            features = stage.features(features)
        assert features.shape == (2, 32, 4, 4)
    assert standard.downsampling == (2, 4) and accelerated.downsampling == (0, 2)
    large = resnet((1, 1, 1), **{**SMALL, "image_size": (64, 64)}, stem="imagenet", downsampling="accelerated")
    assert large.downsampling == (1, 2)


@pytest.mark.parametrize("pool", ["max", "avg", "stride", "space_to_depth"])
def test_pools(pool: str) -> None:
    model = vgg([8, "M", 16], in_channels=1, image_size=(8, 8), hidden=16, pool=pool, seed=0)
    assert model[1].body.conv.in_channels == (32 if pool == "space_to_depth" else 8)
    x = torch.rand(2, 1, 8, 8)
    y, _, _ = model[0](x, torch.tensor([0, 1]))
    torch.testing.assert_close(y, lw.functional.downsample(model[0].body.train()(x).detach(), pool, 2))
    first = vgg([8, 8], in_channels=1, image_size=(8, 8), hidden=None, pool=pool, downsampling=[0], seed=0)
    assert first(x).shape == (2, 10)


def test_plain_networks() -> None:
    model = cnn(6, 8, in_channels=1, image_size=(16, 16), seed=0)
    assert [stage.body.conv.out_channels for stage in model] == [8, 8, 16, 16, 32, 32]
    assert model.downsampling == (2, 4)
    assert model[2].body.conv.in_channels == 32  # space to depth
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 10)


def test_kernel_sizes() -> None:
    model = vgg([4, 6], kernel_size=7, in_channels=1, image_size=(65, 65), hidden=None, num_classes=3, seed=0)
    geometry = [(stage.body.conv.kernel_size, stage.body.conv.stride) for stage in model]
    assert geometry == [((7, 7), (2, 2)), ((7, 7), (1, 1))]  # the first one as for every large image
    model = cnn(3, 4, kernel_size=1, in_channels=1, image_size=(8, 8), num_classes=3, seed=0)
    assert all(stage.body.conv.kernel_size == (1, 1) for stage in model)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    with pytest.raises(ValueError, match="kernel_size is 2; allowed: odd numbers"):
        vgg([4], kernel_size=2)


def test_several_fully_connected_stages() -> None:
    model = vgg([8, "M"], in_channels=1, image_size=(8, 8), hidden=(12, 6), num_classes=3, seed=0)
    assert [tuple(stage.body.conv.weight.shape) for stage in model] == [(8, 1, 3, 3), (12, 8, 4, 4), (6, 12, 1, 1)]


# -- Costs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "mebibytes"), [("vgg8b", 308), ("vgg11b", 452)])
def test_memory_of_the_papers_networks(config: str, mebibytes: int) -> None:
    costs = summary(vgg(config, dim=2048), (3, 32, 32))
    memory = costs.memory_bytes(128)
    assert sum(memory[:-1]) == mebibytes << 20  # without the fully connected layer
    assert max(memory) == 128 << 20  # 256 channels at 32x32
    assert costs.memory_bytes(128, torch.bfloat16) == [m // 2 for m in memory]
    earlier = summary(vgg(config, dim=2048, downsampling="accelerated"), (3, 32, 32)).memory_bytes(128)
    assert max(earlier) < max(memory)


def test_costs_of_a_network() -> None:
    model = vgg([8, "M", 16], in_channels=2, image_size=(8, 8), hidden=None, num_classes=3, bins=2)
    before = copy.deepcopy(model.state_dict())
    costs = summary(model, (2, 8, 8))
    assert [(layer.name, layer.kind, layer.shape) for layer in costs.layers] == [
        ("stages.0.body", "ConvBNReLU2d", (8, 8, 8)),
        ("stages.1.body", "ConvBNReLU2d", (16, 4, 4)),
    ]
    assert [layer.parameters for layer in costs.layers] == [2 * 8 * 9 + 8 + 16, 8 * 16 * 9 + 16 + 32]
    assert [layer.multiply_adds for layer in costs.layers] == [2 * 8 * 9 * 64, 8 * 16 * 9 * 16]
    first, second = costs.stages
    assert (first.input, first.output, second.input, second.output) == ((2, 8, 8), (8, 4, 4), (8, 4, 4), (16, 4, 4))
    assert (first.elements, second.elements) == (512, 256)
    assert (first.head_parameters, first.head_multiply_adds) == (3 * 8 * 4 + 3, 3 * 8 * 4)
    # Forward pass and gradient of the weights; of the head, and of every layer but a stage's first, of the input, too.
    assert costs.local_multiply_adds() == [
        2 * layer.multiply_adds + 3 * stage.head_multiply_adds
        for layer, stage in zip(costs.layers, costs.stages, strict=True)
    ]
    assert summary(list(model), (2, 8, 8)) == costs
    both = nn.Sequential(model[0].body, nn.MaxPool2d(2), model[1].body)
    (together,) = summary([LocalStage(both, model[1].head)], (2, 8, 8)).local_multiply_adds()
    assert together == 2 * costs.layers[0].multiply_adds + 3 * (
        costs.layers[1].multiply_adds + second.head_multiply_adds
    )
    assert model[0].training and all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    text = str(costs)
    assert "stages.1.body" in text and "16x4x4" in text and text.splitlines()[-1].startswith("all")


def test_residual_and_plain_networks_cost_the_same() -> None:
    fused, plain = (summary(resnet((1, 2), **SMALL, fused=fused), (3, 16, 16)) for fused in (True, False))
    assert sorted((c.shape, c.multiply_adds) for c in fused.layers) == sorted(
        (c.shape, c.multiply_adds) for c in plain.layers
    )
    assert [(s.multiply_adds, s.parameters, s.elements) for s in fused.stages] == [
        (s.multiply_adds, s.parameters, s.elements) for s in plain.stages
    ]


@pytest.mark.parametrize("head", ["similarity_projected", "predsim_projected", "contrastive", "conv", "mlp_sr"])
def test_costs_of_heads(head: str) -> None:
    model = vgg([8, 16], in_channels=3, image_size=(8, 8), hidden=None, head=head, seed=0)
    first = summary(model, (3, 8, 8)).stages[0]
    projection = 8 * 8 * 9 * 64  # a 3x3 convolution of the map
    if "projected" in head or head == "conv":
        assert first.head_multiply_adds > projection
    else:
        assert first.head_multiply_adds >= first.head_parameters / 2


@pytest.mark.parametrize("training", [True, False])
def test_operators_count_their_operations(training: bool) -> None:
    """As PyTorch counts those of the plain layers, backward pass included."""
    totals = []
    for fused in (True, False):
        stage = vgg([16], in_channels=3, image_size=(8, 8), hidden=None, fused=fused, seed=0)[0].train(training)
        with FlopCounterMode(display=False) as counter:
            loss = stage(torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).loss
            if training:
                loss.backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


# -- Cutting -----------------------------------------------------------------------------------------------------------


class Row(nn.Sequential):
    """Children as torchvision's ResNet has them, within other containers."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 5),
        )


@pytest.mark.parametrize("fused", [False, True])
def test_split_a_row(fused: bool) -> None:
    torch.manual_seed(0)
    model = Row()
    if fused:
        lw.fuse_(model)
    stages = split(model, input_size=(3, 16, 16))
    assert [len(list(stage.body.children())) for stage in stages] == [3, 4, 3]
    assert isinstance(stages[-1].head, PooledLinearHead) and stages[-1].head.linear is model[-1]
    assert stages[0].head.num_classes == 5
    assert all(a is b for a, b in zip(stages.backbone().parameters(), model.parameters(), strict=True))
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(stages.eval()(x), model.eval()(x))
    stages.train()
    for stage in stages:
        x, loss, _ = stage(x, torch.tensor([0, 1]))
        loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_split_by_number_and_by_units() -> None:
    model = Row()
    assert [len(list(s.body.children())) for s in split(model, [2], input_size=(3, 16, 16))] == [7, 3]
    # Elements 8*256, 16*64, 16*16: the first convolution outweighs the others.
    assert [len(list(s.body.children())) for s in split(model, 2, input_size=(3, 16, 16))] == [3, 7]
    by_units = split(model, 2, input_size=(3, 16, 16), balance="units")
    assert len(by_units) == 2
    whole = split(model, 1, input_size=(3, 16, 16), head="similarity")
    assert len(whole) == 1 and isinstance(whole[0].head, PooledLinearHead)
    assert isinstance(split(model, input_size=(3, 16, 16), head="similarity")[0].head, SimilarityHead)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("balance", ["memory", "operations", "units"])
def test_balance_is_the_best_there_is(stages: int, balance: str) -> None:
    model = resnet((1, 2, 1), **SMALL)
    costs = summary(model, (3, 16, 16)).stages
    values = {"memory": [c.elements for c in costs], "operations": [c.multiply_adds for c in costs],
              "units": [1] * len(costs)}[balance]  # fmt: skip

    def most(starts: tuple[int, ...]) -> int:
        return max(sum(values[a:b]) for a, b in itertools.pairwise([0, *starts, len(values)]))

    best = min(most(starts) for starts in itertools.combinations(range(1, len(values)), stages - 1))
    cut = summary(split(model, stages, input_size=(3, 16, 16), balance=balance), (3, 16, 16)).stages
    parts = {"memory": [c.elements for c in cut], "operations": [c.multiply_adds for c in cut]}
    assert len(cut) == stages
    if balance != "units":
        assert max(parts[balance]) == best


def test_split_stages() -> None:
    model = vgg([8, 8, "M", 16, "M", 16], in_channels=3, image_size=(16, 16), hidden=None, num_classes=4, seed=0)
    nn.init.normal_(model[-1].head.linear.weight)
    heads = [stage.head for stage in model]
    stages = split(model, [2], input_size=(3, 16, 16))
    assert [type(stage.body) for stage in stages] == [FusedChain, FusedChain]
    assert [stage.head for stage in stages] == [heads[1], heads[3]]
    assert stages.downsampling == (2, 3)
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(stages.eval()(x), model.eval()(x))


def test_split_keeps_what_stages_have() -> None:
    model = vgg([8, "M", 8, "M", 16], image_size=(16, 16), hidden=None, num_classes=4, dropout=0.3, seed=0)
    model[1].detach = False
    model[1].head.to(torch.bfloat16)
    model.eval()
    stages = split(model, [2], input_size=(3, 16, 16))
    assert [stage.detach for stage in stages] == [False, True]
    assert [stage.downsample is not None for stage in stages] == [True, False]
    assert [stage.dropout is not None for stage in stages] == [True, False]
    assert sum(isinstance(module, nn.Dropout2d) for module in stages.modules()) == 2  # one is within the first stage
    assert stages[0].head.linear.weight.dtype == torch.bfloat16
    assert not any(module.training for module in stages.modules())
    alike = split(model, input_size=(3, 16, 16))
    assert [stage.body for stage in alike] == [stage.body for stage in model]
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(alike[0].features(x), model[0].features(x))


def test_split_any_row() -> None:
    act = nn.ELU()
    layers = [
        nn.ZeroPad2d(1),
        nn.Conv2d(3, 4, 3),
        act,
        nn.Dropout(0.1),
        nn.Conv2d(4, 4, 3),
        act,
        nn.AdaptiveAvgPool2d(8),
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 64, 3))
    stages = split(model, input_size=(3, 8, 8))
    assert [list(stage.body) for stage in stages] == [layers[:4], layers[4:6]]
    assert isinstance(stages[-1].head, ModuleHead)  # its map has 6 rows, less than the pool gives
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(stages.eval()(x), model.eval()(x))


@pytest.mark.parametrize("head", ["pooled_linear", "predsim", "conv", "contrastive"])
def test_split_a_network_of_linear_layers(head: str) -> None:
    torch.manual_seed(0)
    first = [nn.Flatten(), nn.Linear(48, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.1)]
    second = [nn.Linear(12, 6), nn.ReLU()]
    model = nn.Sequential(*first, *second, nn.Linear(6, 3))
    stages = split(model, input_size=(3, 4, 4), head=head)
    assert [list(stage.body) for stage in stages] == [first, second]
    x, target = torch.rand(5, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(stages.eval()(x), model.eval()(x))
    torch.testing.assert_close(stages.backbone()(x), model(x))
    with torch.no_grad():
        model[-1].weight.zero_()
    trainer = LocalTrainer(stages, lambda p: torch.optim.SGD(p, lr=0.5), progress=False)
    losses = torch.tensor([trainer.step(x, target).loss.tolist() for _ in range(60)])
    assert bool((losses[-1] < losses[0]).all())
    assert summary(stages, (3, 4, 4)).stages[1].output == (6, 1, 1)
    costs = summary(list(stages)[1:], (12,)).stages[0]
    assert (costs.input, costs.elements, costs.multiply_adds) == ((12, 1, 1), 6, 72)


def test_split_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = LibraryResNet()
    state = copy.deepcopy(model.state_dict())
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    split(model, [1], input_size=(3, 16, 16))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_split_residual_stages() -> None:
    model = resnet((1, 2, 1), **SMALL)
    nn.init.normal_(model[-1].head.linear.weight)
    stages = split(model, 2, input_size=(3, 16, 16))
    x = torch.rand(2, 3, 16, 16)
    logits = model.eval()(x)
    assert logits.std() > 0.01
    torch.testing.assert_close(stages.eval()(x), logits)


class LibraryResNet(nn.Module):
    """As torchvision writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(6), BasicBlock(8, 2, 6))
        self.layer2 = nn.Sequential(BasicBlock(8))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


@pytest.mark.parametrize("fused", [False, True])
def test_split_a_library_model(fused: bool) -> None:
    torch.manual_seed(0)
    model = LibraryResNet()
    keys = list(model.state_dict())
    if fused:
        lw.fuse_(model)
    stages = split(model, 3, input_size=(3, 16, 16), balance="units")
    assert sum(len(list(s.body.children())) if type(s.body) is nn.Sequential else 1 for s in stages) == 4 + 3
    assert isinstance(stages[-1].head, PooledLinearHead) and stages[-1].head.linear is model.fc
    x = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(stages.eval()(x), model.eval()(x))
    optimizer = torch.optim.SGD(stages.parameters(), 0.1)
    stages.train()
    before = model.layer1[1].conv1.weight.clone()
    for stage in stages:
        x, loss, _ = stage(x, torch.arange(4))
        loss.backward()
    optimizer.step()
    assert not torch.equal(before, model.layer1[1].conv1.weight)
    assert list(model.state_dict()) == keys


def test_other_outputs() -> None:
    body = [nn.Conv2d(3, 4, 3), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    stages = split(model, input_size=(3, 8, 8))
    head = stages[-1].head
    assert isinstance(head, ModuleHead)
    x, target = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, -100])
    _, loss, logits = stages[0](x, target)
    torch.testing.assert_close(logits, model(x))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(model(x), target))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert stages.backbone().state_dict().keys() == {
        "stage0.0.weight", "stage0.0.bias", "output.2.weight", "output.2.bias", "output.4.weight", "output.4.bias"
    }  # fmt: skip


# -- Errors ------------------------------------------------------------------------------------------------------------


class Doubled(Row):
    """A function in front; the classifier starts from zero, which hides it from the logits."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class Dropping(LibraryResNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(nn.functional.dropout(torch.flatten(x, 1), 0.5, self.training))


class Mean(LibraryResNet):
    """As torchvision's MobileNetV2 pools."""

    def __init__(self) -> None:
        super().__init__()
        self.avgpool = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))).mean((2, 3)))


def test_bad_arguments() -> None:
    for message, call in [
        ("config is 'resnet19'", lambda: resnet("resnet19")),
        (r"config is \[0\]", lambda: resnet((0,))),
        ("block is 'wide'", lambda: resnet((1,), block="wide")),
        ("stem is 'big'", lambda: resnet((1,), stem="big")),
        ("width is 0", lambda: resnet((1,), width=0)),
        ("halves the resolution twice already", lambda: resnet((1, 1), stem="imagenet", downsampling=[0])),
        ("downsampling is 'early'; allowed: 'standard', 'accelerated'", lambda: resnet((1, 1), downsampling="early")),
        (r"downsampling is \[2, 1\]; allowed: different ascending", lambda: resnet((1, 1), downsampling=[2, 1])),
        (r"downsampling is \[9\]; .* from 0 to 2", lambda: resnet((1, 1), downsampling=[9])),
        ("pool is 'median'", lambda: vgg([8], pool="median")),
        ("which downsampling by .'space_to_depth', 2. cannot reduce",
         lambda: vgg([8, "M", 8], image_size=(9, 8), pool="space_to_depth")),
        ("depth is 2", lambda: cnn(2)),
        ("input_size is", lambda: summary(vgg([8], image_size=(8, 8)), (3, 0, 8))),
        ("input_size is", lambda: split(Row(), input_size=(3, 8))),  # type: ignore[arg-type]
        ("stages is 4; allowed: 1 to 3", lambda: split(Row(), 4, input_size=(3, 8, 8))),
        ("stages is 'layer'", lambda: split(Row(), "layer", input_size=(3, 8, 8))),
        (r"stages is \[3\]; allowed: ascending units from 1 to 2", lambda: split(Row(), [3], input_size=(3, 8, 8))),
        ("balance is 'time'", lambda: split(Row(), 2, input_size=(3, 8, 8), balance="time")),
        ("head is 'mlp'", lambda: split(Row(), 2, input_size=(3, 8, 8), head="mlp")),
        ("Doubled is not the row of its children: run in order, Conv2d is given something else in evaluation",
         lambda: split(Doubled(), input_size=(3, 8, 8))),
        ("run in order, Linear is given something else in training", lambda: split(Dropping(), input_size=(3, 16, 16))),
        ("run in order they fail", lambda: split(Mean(), input_size=(3, 16, 16))),
        ("Flatten has no parameters", lambda: split(nn.Flatten(), input_size=(3, 8, 8))),
        ("head is 'auglocal', which", lambda: split(Row(), input_size=(3, 8, 8), head="auglocal")),
        ("head is 'goodness', which", lambda: split(Row(), input_size=(3, 8, 8), head="goodness")),
        (r"num_classes is 5, but images \[1, 2, 2\] have fewer elements",
         lambda: vgg([8], in_channels=1, num_classes=5, image_size=(2, 2), head="goodness")),
        ("hidden is 0; channels", lambda: vgg([8], hidden=0)),
        ("has no convolution", lambda: split(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), input_size=(3, 2, 2))),
        ("label_smoothing is 2", lambda: ModuleHead(nn.Identity(), label_smoothing=2)),
        (r"logits need \[1, num_classes\]",
         lambda: LocalStage(nn.Identity(), ModuleHead(nn.Identity()))(torch.rand(1, 2, 3, 3))),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"Conv2d must give logits"):
        split(nn.Conv2d(3, 4, 3), input_size=(3, 8, 8))


# -- Auxiliary networks of later units ---------------------------------------------------------------------------------


def test_auxiliary_networks_are_like_the_rest() -> None:
    model = vgg([8, 16, "M", 24, 32, "M", 40], in_channels=1, image_size=(16, 16), hidden=12, head="auglocal", seed=0)
    found = []
    for stage in model:
        convolutions = [m for m in stage.head.modules() if isinstance(m, ConvBNReLU2d)]
        found.append(
            [(layer.conv.in_channels, layer.conv.out_channels, layer.conv.kernel_size[0]) for layer in convolutions]
        )
    # Up to three of the later layers, evenly spaced, the last one among them; fewer towards the output.
    assert found == [
        [(8, 24, 3), (24, 32, 3), (32, 12, 4)],
        [(16, 24, 3), (24, 40, 3), (40, 12, 4)],
        [(24, 40, 3), (40, 12, 4)],
        [(32, 40, 3), (40, 12, 4)],
        [(40, 12, 4)],
        [],
    ]
    sizes = [m.output_size for m in model[0].head.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    assert sizes == [(8, 8), (4, 4), 1]
    residual = resnet((1, 2, 1), **SMALL, head="auglocal")
    assert count(residual.backbone()) == count(resnet((1, 2, 1), **SMALL).backbone())
    x = torch.rand(2, 3, 16, 16)
    for stage in residual:
        x, loss, logits = stage(x, torch.tensor([0, 1]))
        loss.backward()
        assert logits.shape == (2, 4) and all(p.grad is not None for p in stage.parameters())
