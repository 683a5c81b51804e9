"""Forward-forward: labels in images, real and wrong pairs, classes from the goodness of all stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layerwise_ext import data
from layerwise_ext.models import StagedModel, resnet, split, vgg
from layerwise_ext.nn import ConvBNReLU2d, GoodnessHead, LocalStage, PooledLinearHead, label_goodness, write_labels
from layerwise_ext.train import DecoupledTrainer, GreedyTrainer, LabelledPairs, LocalTrainer, Trainer
from torch import Tensor, nn

CLASSES = 4


def network(**options: Any) -> StagedModel:
    defaults = {"in_channels": 1, "num_classes": CLASSES, "image_size": (8, 8), "hidden": 12, "seed": 0}
    return vgg([6, "M", 8], **{**defaults, **options}, head="goodness")


def loader(samples: int = 24, batch_size: int = 8) -> data.MemoryLoader:
    """Classes told apart by a bright quadrant."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % CLASSES
    images = torch.randint(0, 60, (samples, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[:, row : row + 4, column : column + 4] += 150
    return data.MemoryLoader(data.Split(images, labels), batch_size, data.Normalization.of(images), shuffle=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_labels_are_in_the_first_elements(layout: torch.memory_format) -> None:
    images = torch.randn(5, 2, 3, 4).contiguous(memory_format=layout)
    before, labels = images.clone(), torch.tensor([6, 0, 3, 1, 1])
    written = write_labels(images, labels, 7)
    assert torch.equal(images, before) and written.is_contiguous(memory_format=layout)
    assert torch.equal(written[:, 0].flatten(1)[:, :7], F.one_hot(labels, 7).float())
    assert torch.equal(written[:, 0].flatten(1)[:, 7:], images[:, 0].flatten(1)[:, 7:])
    assert torch.equal(written[:, 1], images[:, 1])
    with pytest.raises(ValueError, match=r"num_classes is 25; images \[2, 3, 4\] have fewer elements"):
        write_labels(images, labels, 25)


def test_pairs_are_each_image_with_its_label_and_with_a_wrong_one() -> None:
    pairs, plain = LabelledPairs(loader(), CLASSES, seed=3), loader()
    assert len(pairs) == len(plain) == 3
    drawn = torch.zeros(CLASSES, CLASSES)
    for _ in range(20):
        for (both, kinds), (images, labels) in zip(pairs, plain, strict=True):
            assert kinds.tolist() == [1, 0] * 8
            right, wrong = both[0::2], both[1::2]
            found = wrong.flatten(1)[:, :CLASSES].argmax(1)
            assert torch.equal(right, write_labels(images, labels, CLASSES))
            assert torch.equal(wrong, write_labels(images, found, CLASSES))
            drawn[labels, found] += 1
    assert not drawn.diagonal().any()
    assert (drawn + torch.eye(CLASSES)).min() > 0  # every wrong label has its turn
    with pytest.raises(ValueError, match="num_classes is 1; allowed: 2 or more"):
        LabelledPairs(loader(), 1)


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_each_part_of_a_batch_has_both_kinds(parts: int) -> None:
    """Contiguous ones, which several processes get."""
    for _, kinds in LabelledPairs(loader(), CLASSES):
        assert all(set(part.tolist()) == {0, 1} for part in kinds.tensor_split(parts))


def goodness_by_hand(model: StagedModel, images: Tensor) -> Tensor:
    """[S, N, classes]"""
    goodness = torch.zeros(len(model), len(images), CLASSES)
    for label in range(CLASSES):
        x = images.clone()
        x[:, 0, 0, :CLASSES] = F.one_hot(torch.tensor(label), CLASSES).float()
        for index, stage in enumerate(model):
            y = stage.body(x)
            goodness[index, :, label] = y.square().mean((1, 2, 3))
            x = y if stage.downsample is None else stage.downsample(y)
    return goodness


def test_the_network_gives_the_goodness_of_each_label() -> None:
    model = network().eval()
    images = torch.randn(5, 1, 8, 8)
    expected = goodness_by_hand(model, images)
    torch.testing.assert_close(model(images), expected.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(label_goodness(model, images)), expected, rtol=1e-5, atol=1e-5)
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any("output" in key for key in model.backbone_state_dict())


@pytest.mark.parametrize("kind", [LocalTrainer, GreedyTrainer])
def test_evaluation_classifies(kind: type[Trainer]) -> None:
    """The first stages together up to each one, on images without labels."""
    trainer = kind(network(), progress=False)
    trainer.fit(LabelledPairs(loader(), CLASSES), epochs=1)
    batches = list(loader())
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for stage in trainer.stages:
        stage.eval()
    goodness = goodness_by_hand(StagedModel(trainer.stages), images).detach()
    scores = trainer.evaluate(batches)
    together = goodness.cumsum(0)
    assert scores["accuracy"] == [float((each.argmax(1) == labels).double().mean()) for each in together]
    assert scores["final"] == scores["accuracy"][-1]
    torch.testing.assert_close(trainer.predict(images), together[-1], rtol=1e-5, atol=1e-5)
    is_right = F.one_hot(labels, CLASSES).bool()
    for loss, each in zip(scores["loss"], goodness, strict=True):
        right, wrong = each[is_right], each[~is_right]
        expected = (-F.logsigmoid(right - 1).mean() - F.logsigmoid(1 - wrong).mean()) / 2
        assert loss == pytest.approx(float(expected), rel=1e-5)


def test_training_tells_classes_apart() -> None:
    trainer = LocalTrainer(network(), lambda p: torch.optim.Adam(p, lr=1e-2), progress=False)
    history = trainer.fit(LabelledPairs(loader(96), CLASSES), epochs=25, val_loader=loader())
    assert history[-1]["train_accuracy"][-1] > 0.8  # of kinds
    assert trainer.evaluate(loader(96))["final"] > 0.8  # of four classes


def test_processes_give_the_numbers_of_one() -> None:
    local, decoupled = LocalTrainer(network(), progress=False), DecoupledTrainer(network(), workers=2, progress=False)
    for trainer in (local, decoupled):
        trainer.fit(LabelledPairs(loader(), CLASSES), epochs=2)
    for mine, theirs in zip(decoupled.stages, local.stages, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


def test_residual_networks_and_blocks() -> None:
    model = resnet((1, 1), in_channels=1, num_classes=CLASSES, image_size=(8, 8), width=4, head="goodness", seed=0)
    assert all(isinstance(stage.head, GoodnessHead) for stage in model)
    blocks = split(model, 2, input_size=(1, 8, 8))
    trainer = LocalTrainer(blocks, progress=False)
    trainer.fit(LabelledPairs(loader(), CLASSES), epochs=1)
    assert trainer.evaluate(loader())["stages"] == [0, 1]


def test_labels_in_some_stages_only() -> None:
    body = ConvBNReLU2d(1, 4, 3, padding=1)
    stages = [LocalStage(body, GoodnessHead(num_classes=4)), LocalStage(nn.Identity(), PooledLinearHead(4, 4))]
    with pytest.raises(ValueError, match=r"look for labels of \[4, None\] classes; allowed: the same in all stages"):
        LocalTrainer(stages)
    with pytest.raises(ValueError, match="there are no labels to write into images"):
        label_goodness([LocalStage(body, GoodnessHead())], torch.zeros(1, 1, 8, 8))
