"""A network as a list of stages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from layerwise_ext.nn import ClassifierHead, LocalStage, label_goodness
from layerwise_ext.nn.goodness import label_classes


class StagedModel(nn.Module):
    """A chain of :class:`~layerwise_ext.nn.LocalStage`; the last stage's head is the network's output.

    ``model(images)`` gives the logits of that head, by plain forward passes with gradients through the whole network.
    The local heads of the other stages are used by the trainers only. Iterating gives the stages, so a model can be
    passed wherever a list of stages is expected.

    Args:
        stages: at least one; the last one's head must be a :class:`~layerwise_ext.nn.ClassifierHead`, such as
            a :class:`~layerwise_ext.nn.PooledLinearHead` or a :class:`~layerwise_ext.nn.PredSimHead`, or, for a network
            of forward-forward training, a :class:`~layerwise_ext.nn.GoodnessHead` with ``num_classes``.
        downsampling: the schedule that the network was built by, for reports (:mod:`layerwise_ext.models.schedule`);
            None where there was none.
    """

    stages: nn.ModuleList

    def __init__(self, stages: Sequence[LocalStage], downsampling: tuple[int, ...] | None = None) -> None:
        super().__init__()
        if not stages:
            raise ValueError("stages is empty; a network needs at least one stage")
        if not isinstance(stages[-1].head, ClassifierHead) and label_classes(stages) is None:
            raise TypeError(
                f"the last head is {type(stages[-1].head).__name__}; the output needs a classifier: PooledLinearHead, "
                "PredSimHead or another ClassifierHead, or a GoodnessHead with num_classes"
            )
        self.stages = nn.ModuleList(stages)
        self.downsampling = downsampling

    def __len__(self) -> int:
        return len(self.stages)

    def __iter__(self) -> Iterator[LocalStage]:
        return iter(self.stages)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> LocalStage:
        stage = self.stages[index]
        assert isinstance(stage, LocalStage)
        return stage

    def forward(self, images: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, num_classes]``; in forward-forward the goodness of each label."""
        if label_classes(self) is not None:
            return torch.stack(label_goodness(self, images)).sum(0)
        *hidden, last = self
        x = images
        for stage in hidden:
            x = stage.features(x)
        _, moments = last.moments(x)
        return cast(Tensor, last.head(moments).logits)

    def backbone(self) -> nn.Sequential:
        """The network without its local heads, as a plain ``nn.Sequential`` that shares all modules with this one.

        Children ``stage0``, ``stage1``, ..., ``downsample0`` and ``dropout0``, ... behind those stages that have one,
        and ``output`` (pooling, flatten, linear); in forward-forward, whose goodness has no parameters, without it.
        """
        children: OrderedDict[str, nn.Module] = OrderedDict()
        for i, stage in enumerate(self):
            children[f"stage{i}"] = stage.body
            if stage.downsample is not None:
                children[f"downsample{i}"] = stage.downsample
            if stage.dropout is not None:
                children[f"dropout{i}"] = stage.dropout
        head = self[-1].head
        if isinstance(head, ClassifierHead):
            children["output"] = head.to_modules()
        return nn.Sequential(children)

    def backbone_state_dict(self) -> dict[str, Tensor]:
        """Checkpoint of :meth:`backbone`; loads (strictly) into the backbone of a fused or a plain model alike."""
        return self.backbone().state_dict()
