"""What all trainers share: the loop over epochs, metrics, evaluation, checkpoints."""

from __future__ import annotations

import copy
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from layerwise_ext import _graphs
from layerwise_ext.nn import LocalStage
from layerwise_ext.train import random_state

logger = logging.getLogger(__name__)

# One epoch: "epoch" (from 1), "stages" (indices that the lists below are about), "train_loss", "train_accuracy", with a
# val_loader also "val_loss" and "val_accuracy" (lists of floats), and "seconds" (training only).
Record = dict[str, Any]
Batches = Iterable[tuple[Tensor, Tensor]]
OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]

# Seconds between two readings of the running loss for the progress bar; each one waits for the device.
_PROGRESS_INTERVAL = 2.0


class StepResult(NamedTuple):
    """Of each trained stage, ``loss [S]`` and the number of ``correct [S]`` predictions (NaN where the head has no
    classifier); tensors, not read back."""

    loss: Tensor
    correct: Tensor


class Metrics:
    """Loss and accuracy per stage over an epoch, accumulated on the device and read once."""

    def __init__(self, stages: int, device: torch.device) -> None:
        self._loss = torch.zeros(stages, dtype=torch.float64, device=device)
        self._correct = torch.zeros(stages, dtype=torch.float64, device=device)
        self.samples = 0

    def update(self, result: StepResult, samples: int) -> None:
        self._loss.add_(result.loss, alpha=samples)
        self._correct.add_(result.correct)
        self.samples += samples

    def loss(self) -> list[float]:
        """Mean per sample of each stage."""
        return [value / self.samples for value in self._loss.tolist()]

    def accuracy(self) -> list[float]:
        """Between 0 and 1, of each stage; NaN where the head has no classifier."""
        return [value / self.samples for value in self._correct.tolist()]


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The paper's optimiser (arXiv 1901.06656): Adam at 5e-4."""
    return torch.optim.Adam(parameters, lr=5e-4)


class Trainer(ABC):
    """Base class of the trainers; a subclass says which parameters share an optimiser and what a step is.

    Args:
        stages: a :class:`~layerwise_ext.models.StagedModel` or a list of :class:`~layerwise_ext.nn.LocalStage`; the
            last one's head is the network's output. They are trained in place.
        optimizer: makes an optimiser from a list of parameters; called once per group of parameters that are updated
            together.
        scheduler: makes a learning-rate scheduler from an optimiser, or None; stepped once per epoch of that optimiser.
        device: where the stages are moved and the batches are sent; None: where the stages are.
        autocast_dtype: torch.bfloat16 runs the forward passes under autocast; None: in the stages' own dtype.
        seed: of the trainer's own generator, which only shuffles cached data; None: torch's initial seed. Parameters
            and the global generator are left as they are.
        progress: show a progress bar.
        channels_last: keep parameters and batches in torch.channels_last.
        cuda_graph: run steps as a CUDA graph, for networks so small that launching kernels is what takes the time. The
            whole step, optimisers included (they are made ``capturable``), is captured at the fourth batch of one shape
            in a row, and again when a hyperparameter has changed; other batches, such as a last smaller one, run kernel
            by kernel. The stages must not wait for the device.

    Raises:
        ValueError: (``cuda_graph``) stages that are not on a CUDA device, or a batch norm with ``momentum=None``.

    Attributes:
        epoch: number of finished epochs, over all stages.
        history: one :data:`Record` per finished epoch.
    """

    def __init__(
        self,
        stages: Iterable[LocalStage],
        optimizer: OptimizerFactory = adam,
        *,
        scheduler: SchedulerFactory | None = None,
        device: torch.device | str | None = None,
        autocast_dtype: torch.dtype | None = None,
        seed: int | None = None,
        progress: bool = True,
        channels_last: bool = True,
        cuda_graph: bool = False,
    ) -> None:
        self.stages = list(stages)
        self._check_stages()
        if autocast_dtype not in (None, torch.bfloat16):
            raise ValueError(f"autocast_dtype is {autocast_dtype}; allowed: torch.bfloat16, None")
        if device is None:
            device = next(p.device for stage in self.stages for p in stage.parameters())
        self.device = torch.device(device)
        if cuda_graph:
            _graphs.check_device(self.device)
            _graphs.check_capturable(self.stages)
        self.autocast_dtype = autocast_dtype
        self.progress = progress
        self.channels_last = channels_last
        for stage in self.stages:
            stage.to(self.device)
            if channels_last:
                stage.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
        groups = [[p for p in group if p.requires_grad] for group in self._parameter_groups()]
        self.optimizers = [optimizer(group) for group in groups]
        self._captured = _graphs.CapturedFunction(self._step, self._settings) if cuda_graph else None
        self._reset_capture()
        self.schedulers = [scheduler(o) for o in self.optimizers] if scheduler is not None else []
        if any(isinstance(s, ReduceLROnPlateau) for s in self.schedulers):
            raise ValueError("scheduler is ReduceLROnPlateau, which needs a metric; use one that is stepped per epoch")
        self.epoch = 0
        self.history: list[Record] = []
        self._saved_random_state: dict[str, Any] | None = None
        self._loader: Any = None

    def step(self, x: Tensor, target: Tensor) -> StepResult:
        """One training step on a batch that is already on the device; does not wait for the device.

        ``x`` is a batch of images ``[N, C, H, W]`` (for :class:`GreedyTrainer`, of the current stage's inputs),
        ``target`` ``[N]`` int64.
        """
        if self._captured is None:
            return self._step(x, target)
        return StepResult(*(t.clone() for t in self._captured(x, target)))  # the graph overwrites its own

    @abstractmethod
    def _step(self, x: Tensor, target: Tensor) -> StepResult:
        """What :meth:`step` does, kernel by kernel."""

    def _settings(self) -> Any:
        """What is fixed in a captured step."""
        return _graphs.settings_of(self.stages), tuple(map(_graphs.settings_of_optimizer, self.optimizers))

    def _reset_capture(self) -> None:
        """To be called when the step is another one, or works on other memory, than before."""
        if self._captured is not None:
            self._captured.reset()
            for optimizer in self.optimizers:
                _graphs.make_capturable(optimizer)

    @abstractmethod
    def _parameter_groups(self) -> list[list[nn.Parameter]]:
        """The parameters of each optimiser."""

    @abstractmethod
    def _reported(self) -> list[int]:
        """Indices of the stages whose heads are evaluated, ascending."""

    def _trained(self) -> list[int]:
        """Indices of the stages that the results of :meth:`step` are about."""
        return self._reported()

    def _active_groups(self) -> list[int]:
        """Indices of the optimisers that the current epoch uses."""
        return list(range(len(self.optimizers)))

    def _set_training(self) -> None:
        """Put every stage into the mode in which :meth:`step` runs it."""
        for stage in self.stages:
            stage.train()

    def _next_epoch(self, epochs: int) -> bool:
        """Whether there is another epoch to train."""
        return self.epoch < epochs

    def _epoch_batches(self, loader: Batches) -> tuple[Batches, int | None]:
        """What the current epoch trains on, and the number of batches if it is known."""
        return loader, length(loader)

    def _count_epoch(self) -> None:
        self.epoch += 1

    def _check_stages(self) -> None:
        """Refuse stages that this trainer cannot train."""
        if not self.stages:
            raise ValueError("stages is empty; there is nothing to train")
        for index, stage in enumerate(self.stages):
            if not isinstance(stage, LocalStage):
                raise TypeError(f"stages[{index}] is {type(stage).__name__}; a LocalStage is needed")

    def fit(
        self,
        loader: Batches,
        epochs: int,
        val_loader: Batches | None = None,
        on_epoch_end: Callable[[Trainer, Record], None] | None = None,
    ) -> list[Record]:
        """Train until ``epochs`` epochs are done in all, those before :meth:`load_state_dict` included.

        Args:
            loader: any iterable of ``(images, target)`` batches, iterated once per epoch.
            epochs: the total; :class:`GreedyTrainer` counts it for each stage.
            val_loader: evaluated after each epoch.
            on_epoch_end: called as ``on_epoch_end(trainer, record)`` with everything up to date, so that a checkpoint
                of :meth:`state_dict` written there continues with the next epoch.

        Returns:
            ``history``.

        Raises:
            ValueError: ``epochs`` below 1.
            RuntimeError: the loader gave no batches.
        """
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}; allowed: 1 or more, the total number")
        self._loader = loader
        if self._saved_random_state is not None:
            random_state.restore(self._saved_random_state, loader, self.device)
            self._saved_random_state = None
        while self._next_epoch(epochs):
            record = self._train_epoch(loader)
            if val_loader is not None:
                scores = self.evaluate(val_loader)
                record["val_loss"], record["val_accuracy"] = scores["loss"], scores["accuracy"]
            for group in self._active_groups() if self.schedulers else []:
                self.schedulers[group].step()
            self._count_epoch()
            self.history.append(record)
            logger.info("epoch %d: %s", record["epoch"], _summary(record))
            if on_epoch_end is not None:
                on_epoch_end(self, record)
        return self.history

    def _train_epoch(self, loader: Batches) -> Record:
        start = last_shown = time.perf_counter()
        self._set_training()
        batches, total = self._epoch_batches(loader)
        metrics = Metrics(len(self._trained()), self.device)
        with tqdm(
            total=total, desc=f"epoch {self.epoch + 1}", unit="batch", leave=False, disable=not self.progress
        ) as bar:
            for images, target in self._on_device(batches):
                metrics.update(self.step(images, target), len(target))
                bar.update()
                now = time.perf_counter()
                if self.progress and now - last_shown > _PROGRESS_INTERVAL:
                    last_shown = now
                    bar.set_postfix(loss=f"{metrics.loss()[-1]:.4f}", accuracy=f"{metrics.accuracy()[-1]:.4f}")
        if metrics.samples == 0:
            raise RuntimeError("loader gave no batches; note that an iterator is used up after one epoch")
        losses = metrics.loss()
        for stage, loss in zip(self._trained(), losses, strict=True):
            if not math.isfinite(loss):
                logger.warning("epoch %d: the loss of stage %d is %s", self.epoch + 1, stage, loss)
        return {
            "epoch": self.epoch + 1,
            "stages": self._trained(),
            "train_loss": losses,
            "train_accuracy": metrics.accuracy(),
            "seconds": time.perf_counter() - start,
        }

    def evaluate(self, loader: Batches) -> dict[str, Any]:
        """Loss and accuracy in eval mode, without touching parameters or statistics.

        Returns:
            ``stages`` (indices of the heads that were evaluated), ``loss`` and ``accuracy`` (one float per such stage;
            the mean over samples; an accuracy is NaN where the head has no classifier), ``final`` (accuracy of the
            last of them) and ``samples``.
        """
        reported = self._reported()
        metrics = Metrics(len(reported), self.device)
        with self._eval_mode(), torch.inference_mode():
            for images, target in self._on_device(loader):
                metrics.update(self._score(images, target, reported), len(target))
        if metrics.samples == 0:
            raise RuntimeError("loader gave no batches; there is nothing to evaluate")
        accuracy = metrics.accuracy()
        return {
            "stages": reported,
            "loss": metrics.loss(),
            "accuracy": accuracy,
            "final": accuracy[-1],
            "samples": metrics.samples,
        }

    def _score(self, x: Tensor, target: Tensor, reported: list[int]) -> StepResult:
        losses, logits, images = [], [], x
        with self._autocast():
            for index, stage in enumerate(self.stages[: reported[-1] + 1]):
                if index in reported:
                    output = stage(x, target, images)
                    losses.append(output.loss)
                    logits.append(output.logits)
                    x = output.features
                else:
                    x = stage.features(x)
        return step_result(losses, logits, target)

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        training = [(module, module.training) for stage in self.stages for module in stage.modules()]
        for stage in self.stages:
            stage.eval()
        try:
            yield
        finally:
            for module, flag in training:
                module.training = flag

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def _on_device(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(f"the loader gave a {type(batch).__name__}; each batch must be a pair (images, target)")
            images, target = batch
            if self.channels_last and images.dim() == 4:
                images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            else:
                images = images.to(self.device, non_blocking=True)
            yield images, target.to(self.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on as if :meth:`fit` had not stopped.

        Tensors, numbers, strings, lists and dictionaries only, so ``torch.load(weights_only=True)`` reads it. Holds the
        state of torch's global generators and of the loader's, not Python's or NumPy's: augmentation that draws from
        those must be seeded by the caller. The tensors are the live ones, as in any state_dict.
        """
        return {
            "trainer": type(self).__name__,
            "epoch": self.epoch,
            "history": copy.deepcopy(self.history),
            "stages": [stage.state_dict() for stage in self.stages],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "generator": self.generator.get_state(),
            "random_state": self._random_state(),
        }

    def _random_state(self) -> dict[str, Any] | None:
        """None before the first fit: nothing has depended on the generators yet."""
        if self._saved_random_state is not None or self._loader is None:
            return self._saved_random_state
        return random_state.capture(self._loader, self.device)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict` into a trainer made with the same arguments.

        The global and the loader's generators are set when :meth:`fit` next starts.

        Raises:
            ValueError: the state is of another trainer, or of another number of stages, optimisers or schedulers.
        """
        if state["trainer"] != type(self).__name__:
            raise ValueError(f"the state is of a {state['trainer']}; this is a {type(self).__name__}")
        for name in ("stages", "optimizers", "schedulers"):
            found, expected = len(state[name]), len(getattr(self, name))
            if found != expected:
                raise ValueError(f"the state has {found} {name}; this trainer has {expected}")
        for stage, stage_state in zip(self.stages, state["stages"], strict=True):
            stage.load_state_dict(stage_state)
        # Optimisers keep the tensors they are given: without the copy, two trainers would share their moments.
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            capturable = _graphs.capturable(optimizer)  # of this trainer, whatever the one before ran on
            optimizer.load_state_dict(copy.deepcopy(optimizer_state))
            _graphs.set_capturable(optimizer, capturable)
        self._reset_capture()
        for scheduler, scheduler_state in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(scheduler_state)
        self.generator.set_state(state["generator"])
        self.epoch = state["epoch"]
        self.history = copy.deepcopy(state["history"])
        self._saved_random_state = state["random_state"]


def step_result(losses: list[Tensor], logits: list[Tensor | None], target: Tensor) -> StepResult:
    """Metrics of one batch from the loss and the logits ``[N, num_classes]`` of each stage."""
    with torch.no_grad():
        # A stage without logits predicts nothing: its row is not a number of samples.
        hits = [None if t is None else t.argmax(dim=1).eq(target) for t in logits]
        missing = torch.full_like(target, float("nan"), dtype=torch.float64)
        correct = torch.stack([missing if t is None else t.double() for t in hits]).sum(dim=1)
        return StepResult(torch.stack(losses).detach(), correct)


def length(loader: Batches) -> int | None:
    """Number of batches, None where the loader does not say."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # an iterable without a length, or a DataLoader over one
        return None


def _summary(record: Record) -> str:
    parts = [f"{name} {record[name][-1]:.4f}" for name in ("train_loss", "train_accuracy") if name in record]
    parts += [f"{name} {record[name][-1]:.4f}" for name in ("val_loss", "val_accuracy") if name in record]
    return ", ".join([*parts, f"{record['seconds']:.1f} s"])
