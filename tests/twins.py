"""Every method of the package once more, in plain PyTorch, from the formulas of its paper: the readable definition.

Nothing of the package is used but its reader of data, and nothing is fast; test_methods.py holds the package to what
stands here. A network is a list of stages. A stage is a convolution with batch norm and an activation (``body``), what
reduces its output for the next stage (``pool``), and a loss of its own (``head``):

    y = body(x)        loss = head(y, target, image)        x of the next stage = pool(y)

y is [N, C, H, W], target int64 [N], image what the first stage got. Methods differ in the head, and in where gradients
stop and what is updated when: :func:`fit`, :func:`fit_greedily`, :func:`pretrain`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from layerwise_ext import data
from torch import Tensor, nn

CLASSES = 10

# -- Networks ----------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A convolution that reads ``inputs`` channels of ``size`` x ``size`` and has ``channels``."""

    inputs: int
    size: int
    channels: int
    activation: Callable[[], nn.Module]
    is_pooled: bool = False  # 2x2 in front of the next one
    is_fully_connected: bool = False  # its kernel covers the map

    @property
    def output_size(self) -> int:
        return 1 if self.is_fully_connected else self.size


class Stage(nn.Module):
    def __init__(self, body: nn.Module, head: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.body, self.head, self.pool = body, head, pool


def layers(
    config: Sequence[int | str], hidden: int, activation: Callable[[], nn.Module] = nn.ReLU, size: int = 8
) -> list[Layer]:
    """3x3 convolutions of these widths, 'M' for a 2x2 max pool behind one, then a fully connected layer."""
    found: list[Layer] = []
    inputs = 1
    for width, following in zip(config, [*config[1:], None], strict=True):
        if isinstance(width, int):
            found.append(Layer(inputs, size, width, activation, is_pooled=following == "M"))
            inputs = width
        else:
            size //= 2
    return [*found, Layer(inputs, size, hidden, activation, is_fully_connected=True)]


def body(layer: Layer, inputs: int) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    kernel_size, padding = (layer.size, 0) if layer.is_fully_connected else (3, 1)
    conv = nn.Conv2d(inputs, layer.channels, kernel_size, padding=padding)
    return nn.Sequential(conv, nn.BatchNorm2d(layer.channels), layer.activation())


def network(layers: Sequence[Layer], head: str, **options: Any) -> list[Stage]:
    """Stages with the local loss ``head`` each; ``options`` are those of :func:`local_loss`."""
    stages = []
    for index, layer in enumerate(layers):
        modules = body(layer, layer.inputs)
        if head == "goodness":  # the length of its input would tell a stage how good that is
            modules.insert(0, nn.RMSNorm((layer.inputs, layer.size, layer.size), elementwise_affine=False))
        pool = nn.MaxPool2d(2) if layer.is_pooled else nn.Identity()
        stages.append(Stage(modules, local_loss(layers, index, head, **options), pool))
    return stages


# -- Local losses ------------------------------------------------------------------------------------------------------


def local_loss(
    layers: Sequence[Layer],
    index: int,
    head: str,
    *,
    dim: int = 1024,
    smoothing: float = 0.0,
    normalization: data.Normalization | None = None,
) -> nn.Module:
    """The loss of a stage; the network's output is a classifier whatever the others are."""
    channels, size = layers[index].channels, layers[index].output_size
    if head == "goodness":
        return Goodness()
    if head == "predsim":
        return predsim(Classifier(pooled_linear(channels, size, dim), smoothing), Similarity())
    if head == "predsim_projected":
        pred = Classifier(pooled_linear(channels, size, dim), smoothing)
        return predsim(pred, Similarity(projection(channels, size)))
    if head == "pooled_linear" or index == len(layers) - 1:
        return Classifier(pooled_linear(channels, size, dim), smoothing)
    if head == "similarity":
        return Similarity()
    if head == "similarity_projected":
        return Similarity(projection(channels, size))
    if head == "contrastive":
        return Contrastive(contrastive_network(channels, size, dim))
    if head in ("conv", "mlp_sr"):
        return Classifier({"conv": conv_head, "mlp_sr": mlp_sr}[head](channels, size), smoothing)
    if head == "auglocal":
        return Classifier(auglocal(layers, index), smoothing)
    reconstruction = Reconstruction(channels, layers[0].inputs, normalization)
    if head == "reconstruction":
        return reconstruction
    share = index / max(1, len(layers) - 2)  # 0 at the first stage, 1 at the last one before the output
    if head == "infopro":
        return infopro(reconstruction, Classifier(infopro_network(channels, CLASSES), smoothing), share)
    if head == "infopro_contrastive":
        return infopro(reconstruction, Contrastive(infopro_network(channels, 128)), share)
    raise ValueError(f"head is {head!r}")


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Mean of -sum_k q_k log p_k with q = (1 - s) one_hot + s / K (Szegedy et al. 2016, arXiv 1512.00567)."""
    q = (1 - smoothing) * F.one_hot(target, logits.shape[1]).to(logits) + smoothing / logits.shape[1]
    return -(q * logits.log_softmax(1)).sum(1).mean()


class Classifier(nn.Module):
    """Cross-entropy of a small network on the stage's output."""

    def __init__(self, network: nn.Module, smoothing: float) -> None:
        super().__init__()
        self.network, self.smoothing = network, smoothing

    def logits(self, y: Tensor) -> Tensor:
        return self.network(y)

    def forward(self, y: Tensor, target: Tensor, image: Tensor) -> Tensor:
        return cross_entropy(self.logits(y), target, self.smoothing)


def convolution(inputs: int, channels: int, kernel_size: int) -> list[nn.Module]:
    """Without a bias, which the batch norm behind it would take away."""
    conv = nn.Conv2d(inputs, channels, kernel_size, padding=kernel_size // 2, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU()]


def zero_linear(inputs: int) -> nn.Linear:
    """To the classes, from zero weights."""
    linear = nn.Linear(inputs, CLASSES)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def pooling_kernel(channels: int, size: int, dim: int) -> tuple[int, int]:
    """Doubled, rows then columns, until at most ``dim`` features are left (arXiv 1901.06656)."""
    rows = columns = 1
    while channels * (size // rows) * (size // columns) > dim:
        if rows == columns:
            rows *= 2
        else:
            columns *= 2
    return rows, columns


def pooled_linear(channels: int, size: int, dim: int) -> nn.Sequential:
    """'pred' (Nokland & Eidnes 2019, arXiv 1901.06656): average pooling and a linear layer."""
    rows, columns = pooling_kernel(channels, size, dim)
    features = channels * (size // rows) * (size // columns)
    return nn.Sequential(nn.AvgPool2d((rows, columns)), nn.Flatten(), zero_linear(features))


def conv_head(channels: int, size: int, depth: int = 2) -> nn.Sequential:
    """Depth k of greedy training (Belilovsky et al. 2019, arXiv 1812.11446): k - 1 convolutions, 2x2 means, linear."""
    cells = min(2, size)
    convolutions = [module for _ in range(depth - 1) for module in convolution(channels, channels, 3)]
    pool = [nn.AdaptiveAvgPool2d(cells), nn.BatchNorm2d(channels), nn.Flatten()]
    return nn.Sequential(*convolutions, *pool, zero_linear(channels * cells**2))


def mlp_sr(channels: int, size: int) -> nn.Sequential:
    """'MLP-SR' (Belilovsky et al. 2020, arXiv 1901.08164): three 1x1 convolutions at a quarter of the resolution, 2x2
    means, three linear layers and the classifier's."""
    quarter = -(-size // 4)
    cells = min(2, quarter)
    units = 4 * channels
    modules: list[nn.Module] = [nn.AdaptiveAvgPool2d(quarter)]
    modules += [module for _ in range(3) for module in convolution(channels, channels, 1)]
    modules += [nn.AdaptiveAvgPool2d(cells), nn.Flatten()]
    for inputs in (channels * cells**2, units, units):
        modules += [nn.Linear(inputs, units, bias=False), nn.BatchNorm1d(units), nn.ReLU()]
    return nn.Sequential(*modules, zero_linear(units))


def auglocal(layers: Sequence[Layer], index: int) -> nn.Sequential:
    """AugLocal (Ma et al. 2024, arXiv 2402.17318): copies, with weights of their own, of layers evenly spaced between
    this one and the last, which is among them; three at the first stage, fewer towards the output."""
    last = len(layers) - 1
    number = min(round(3 - 1.5 * index / max(1, last - 1)), last - index)
    channels, size = layers[index].channels, layers[index].output_size
    modules: list[nn.Module] = []
    for step in range(1, number + 1):
        layer = layers[index + round(step * (last - index) / number)]
        if layer.size < size:
            modules.append(nn.AdaptiveAvgPool2d(layer.size))
        modules.append(body(layer, channels))
        channels, size = layer.channels, layer.output_size
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), zero_linear(channels))


def projection(channels: int, size: int) -> nn.Conv2d:
    """Of the paper's similarity matching; a map of one pixel needs no neighbours."""
    kernel_size = 1 if size == 1 else 3
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False)


class Similarity(nn.Module):
    """'sim' (arXiv 1901.06656): mean of (S(features) - S(labels))^2 over all pairs of samples.

    S are the cosines between samples, each less its own mean; those of one-hot labels are 1 within a class and
    -1 / (K - 1) between classes. The features are the standard deviations of each channel over the map; of the map
    itself, or of a convolution of it, which is the paper's form.
    """

    def __init__(self, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, y: Tensor, target: Tensor, image: Tensor) -> Tensor:
        z = y if self.projection is None else self.projection(y)
        features = z.flatten(1) if z.shape[2:] == (1, 1) else z.flatten(2).std(2)
        x = features - features.mean(1, keepdim=True)
        x = x / (1e-8 + x.norm(dim=1, keepdim=True))
        same_class = (target[:, None] == target).to(x)
        return F.mse_loss((x @ x.T).clamp(-1, 1), (CLASSES * same_class - 1) / (CLASSES - 1))


class WeightedSum(nn.Module):
    """Of losses; the logits are those of the first one that has some."""

    def __init__(self, *terms: tuple[float, nn.Module]) -> None:
        super().__init__()
        self.weights = [weight for weight, _ in terms]
        self.terms = nn.ModuleList(term for _, term in terms)

    def logits(self, y: Tensor) -> Tensor:
        return next(term for term in self.terms if isinstance(term, Classifier)).logits(y)

    def forward(self, y: Tensor, target: Tensor, image: Tensor) -> Tensor:
        losses = [weight * term(y, target, image) for weight, term in zip(self.weights, self.terms, strict=True)]
        return torch.stack(losses).sum()


def predsim(pred: Classifier, similarity: Similarity) -> WeightedSum:
    """(1 - beta) pred + beta sim, beta = 0.99 (arXiv 1901.06656), which scales the output's cross-entropy, too."""
    return WeightedSum((0.01, pred), (0.99, similarity))


class Contrastive(nn.Module):
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362): for each sample with partners in its class
    the mean over them of -log(exp(cos / T) / sum over all other samples of exp(cos / T))."""

    def __init__(self, network: nn.Module, temperature: float = 0.07) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, y: Tensor, target: Tensor, image: Tensor) -> Tensor:
        x = F.normalize(self.network(y))
        itself = torch.eye(len(x), dtype=torch.bool)
        scores = (x @ x.T / self.temperature).masked_fill(itself, -torch.inf)
        partners = (target[:, None] == target) & ~itself
        log_p = scores.log_softmax(1).masked_fill(~partners, 0)
        means = [row.sum() / mask.sum() for row, mask in zip(log_p, partners, strict=True) if mask.any()]
        return -torch.stack(means).mean()


def contrastive_network(channels: int, size: int, dim: int) -> nn.Sequential:
    """The pooling of 'pred', linear, ReLU, linear to 128 features."""
    rows, columns = pooling_kernel(channels, size, dim)
    features = channels * (size // rows) * (size // columns)
    return nn.Sequential(
        nn.AvgPool2d((rows, columns)), nn.Flatten(), nn.Linear(features, features), nn.ReLU(), nn.Linear(features, 128)
    )


class Reconstruction(nn.Module):
    """Binary cross-entropy between a decoder's picture and the image in [0, 1] (InfoPro, arXiv 2101.10832)."""

    def __init__(self, channels: int, image_channels: int, normalization: data.Normalization | None) -> None:
        super().__init__()
        self.normalization = normalization
        picture = [nn.Conv2d(12, image_channels, 3, padding=1), nn.Sigmoid()]
        self.decoder = nn.Sequential(*convolution(channels, 12, 3), *picture)

    def forward(self, y: Tensor, target: Tensor, image: Tensor) -> Tensor:
        assert self.normalization is not None
        pixels = image * self.normalization.std.view(-1, 1, 1) + self.normalization.mean.view(-1, 1, 1)
        enlarged = F.interpolate(y, image.shape[2:], mode="bilinear", align_corners=True)
        return F.binary_cross_entropy(self.decoder(enlarged), pixels.clamp(0, 1))


def infopro_network(channels: int, features: int) -> nn.Sequential:
    """Convolution, mean over the map, 128 hidden units (Wang et al. 2021, arXiv 2101.10832)."""
    mean = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(
        *convolution(channels, channels, 3), *mean, nn.Linear(channels, 128), nn.ReLU(), nn.Linear(128, features)
    )


def infopro(reconstruction: Reconstruction, task: nn.Module, share: float) -> WeightedSum:
    """InfoPro (arXiv 2101.10832): keep what the image says and tell the classes apart, with weights that go linearly
    from 5 and 0.5 at the first stage to 1 and 1."""
    return WeightedSum((5 - 4 * share, reconstruction), (0.5 + 0.5 * share, task))


class Goodness(nn.Module):
    """Forward-forward (Hinton 2022, arXiv 2212.13345): -log sigmoid(mean of y^2 - threshold) for real samples, target
    1, and -log sigmoid(threshold - mean of y^2) for the others, target 0."""

    def forward(self, y: Tensor, target: Tensor, image: Tensor) -> Tensor:
        excess = self.goodness(y) - 1.0
        return -F.logsigmoid(torch.where(target == 1, excess, -excess)).mean()

    @staticmethod
    def goodness(y: Tensor) -> Tensor:
        return y.square().mean((1, 2, 3))


# -- Training ----------------------------------------------------------------------------------------------------------

Batches = Iterable[tuple[Tensor, Tensor]]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
History = list[list[float]]  # of each epoch, the mean loss of each head that was trained


def fit(
    blocks: Sequence[Sequence[Stage]],
    batches: Batches,
    epochs: int,
    optimizer: MakeOptimizer,
    supervision: float = 0.0,
) -> History:
    """Joint training of the stages of a block, local training of the blocks.

    The loss of a block is that of its last head, with ``supervision`` times those of the others (Lee et al. 2015, arXiv
    1409.5185). No gradient crosses a block. One block is ordinary training; blocks of one stage are the local training
    of Nokland & Eidnes 2019, arXiv 1901.06656: each stage is updated before the next one sees its output, which is that
    from before the update.
    """
    optimizers = [optimizer([p for stage in block for p in stage.parameters()]) for block in blocks]
    for block in blocks:
        for stage in block:
            stage.train()
    history = []
    for _ in range(epochs):
        sums, samples = torch.zeros(()), 0
        for image, target in batches:
            x, losses = image, []
            for block, update in zip(blocks, optimizers, strict=True):
                total = torch.zeros(())
                for stage in block:
                    y = stage.body(x)
                    weight = 1.0 if stage is block[-1] else supervision
                    if weight > 0:
                        losses.append(stage.head(y, target, image))
                        total = total + weight * losses[-1]
                    x = stage.pool(y)
                update.zero_grad()
                total.backward()
                update.step()
                x = x.detach()
            sums, samples = sums + len(target) * torch.stack(losses).detach(), samples + len(target)
        history.append((sums / samples).tolist())
    return history


def fit_greedily(stages: Sequence[Stage], batches: Batches, epochs: int, optimizer: MakeOptimizer) -> History:
    """One stage after another, those before it frozen (Belilovsky et al. 2019, arXiv 1812.11446)."""
    history = []
    for index, stage in enumerate(stages):
        history += fit([[stage]], Encoded(stages[:index], batches), epochs, optimizer)
    return history


class Encoded:
    """Batches as frozen stages give them: in eval mode, so with running statistics, which stay as they are."""

    def __init__(self, stages: Sequence[Stage], batches: Batches) -> None:
        self.stages, self.batches = stages, batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, target in self.batches:
            with torch.no_grad():
                for stage in self.stages:
                    x = stage.eval().pool(stage.body(x))
            yield x, target


class Decoder(nn.Module):
    """Undoes a stage backwards: each pixel of a pooled map four times, then the transposed convolution."""

    def __init__(self, stage: Stage, tied: bool = False) -> None:
        super().__init__()
        conv = stage.body[0]
        factor = stage.pool.kernel_size if isinstance(stage.pool, nn.MaxPool2d) else 1
        self.enlarge = nn.Upsample(scale_factor=factor)
        self.transpose = nn.ConvTranspose2d(conv.out_channels, conv.in_channels, conv.kernel_size, padding=conv.padding)
        nn.init.normal_(self.transpose.weight, std=(conv.weight.numel() / conv.in_channels) ** -0.5)
        nn.init.zeros_(self.transpose.bias)
        if tied:
            self.transpose.weight = conv.weight

    def forward(self, code: Tensor) -> Tensor:
        return self.transpose(self.enlarge(code))


def pretrain(
    stages: Sequence[Stage],
    decoders: Sequence[Decoder],
    batches: Batches,
    epochs: int,
    optimizer: MakeOptimizer,
    noise: float = 0.0,
) -> History:
    """Stacked autoencoders (Bengio et al. 2007): each stage learns a code of the one before's, from which its decoder
    recovers that; with ``noise``, where so many of its numbers were set to zero (Vincent et al. 2008)."""
    history = []
    for index, (stage, decoder) in enumerate(zip(stages, decoders, strict=True)):
        update = optimizer(list(dict.fromkeys([*stage.body.parameters(), *decoder.parameters()])))
        for _ in range(epochs):
            total, samples = 0.0, 0
            for x, _ in Encoded(stages[:index], batches):
                kept = torch.empty_like(x).bernoulli_(1 - noise)
                code = stage.train().pool(stage.body(x * kept))
                loss = F.mse_loss(decoder(code), x)
                update.zero_grad()
                loss.backward()
                update.step()
                total, samples = total + len(x) * loss.item(), samples + len(x)
            history.append([total / samples])
    return history


# -- Forward-forward ---------------------------------------------------------------------------------------------------


def write_label(images: Tensor, labels: Tensor) -> Tensor:
    """Into the first pixels of the image: one-hot."""
    flat = images.flatten(1).clone()
    flat[:, :CLASSES] = F.one_hot(labels, CLASSES).to(flat)
    return flat.view(images.shape)


class RealAndWrong:
    """Each batch with its labels written into the images, target 1, and with wrong ones, target 0."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            wrong = (labels + torch.randint(1, CLASSES, labels.shape)) % CLASSES
            both = torch.cat([write_label(images, labels), write_label(images, wrong)])
            yield both, torch.cat([torch.ones_like(labels), torch.zeros_like(labels)])


# -- Evaluation --------------------------------------------------------------------------------------------------------


def predict(stages: Sequence[Stage], images: Tensor) -> Tensor:
    """Labels [N]: those of the last head, or in forward-forward the ones that are good in all stages together."""
    with torch.no_grad():
        if isinstance(stages[-1].head, Goodness):
            scores = []
            for label in range(CLASSES):
                x = write_label(images, torch.full((len(images),), label))
                score = torch.zeros(len(images))
                for stage in stages:
                    y = stage.eval().body(x)
                    score = score + stage.head.goodness(y)
                    x = stage.pool(y)
                scores.append(score)
            return torch.stack(scores, 1).argmax(1)
        x = images
        for stage in stages[:-1]:
            x = stage.eval().pool(stage.body(x))
        return stages[-1].head.logits(stages[-1].eval().body(x)).argmax(1)


def accuracy(stages: Sequence[Stage], batches: Batches) -> float:
    hits = [predict(stages, images) == target for images, target in batches]
    return float(torch.cat(hits).double().mean())


# -- The methods -------------------------------------------------------------------------------------------------------


def joint(stages: list[Stage], batches: Batches, epochs: int, optimizer: MakeOptimizer) -> History:
    return fit([stages], batches, epochs, optimizer)


def deeply_supervised(stages: list[Stage], batches: Batches, epochs: int, optimizer: MakeOptimizer) -> History:
    return fit([stages], batches, epochs, optimizer, supervision=0.3)


def undetached(stages: list[Stage], batches: Batches, epochs: int, optimizer: MakeOptimizer) -> History:
    """Local losses with gradients that cross stages. Adam treats each number by itself, so one optimiser serves all."""
    return fit([stages], batches, epochs, optimizer, supervision=1.0)


def local(stages: list[Stage], batches: Batches, epochs: int, optimizer: MakeOptimizer) -> History:
    return fit([[stage] for stage in stages], batches, epochs, optimizer)


def blockwise(stages: list[Stage], batches: Batches, epochs: int, optimizer: MakeOptimizer) -> History:
    return fit([stages[:2], stages[2:]], batches, epochs, optimizer)


def forward_forward(stages: list[Stage], batches: Batches, epochs: int, optimizer: MakeOptimizer) -> History:
    return local(stages, RealAndWrong(batches), epochs, optimizer)


def pretrained(stages: list[Stage], batches: Batches, epochs: int, optimizer: MakeOptimizer) -> History:
    pretrain(stages, list(map(Decoder, stages)), batches, epochs, optimizer)
    return joint(stages, batches, epochs, optimizer)


def pretrained_denoising(stages: list[Stage], batches: Batches, epochs: int, optimizer: MakeOptimizer) -> History:
    pretrain(stages, list(map(Decoder, stages)), batches, epochs, optimizer, noise=0.2)
    return joint(stages, batches, epochs, optimizer)


class Method(NamedTuple):
    """How the stages are trained, and on which local loss."""

    train: Callable[[list[Stage], Batches, int, MakeOptimizer], History]
    head: str = "pooled_linear"
    smoothing: float = 0.0


METHODS = {
    "joint": Method(joint),
    "deep supervision": Method(deeply_supervised),
    "no detach": Method(undetached),
    "blocks": Method(blockwise),
    "greedy": Method(fit_greedily),
    "decoupled": Method(local),  # the stages in parallel, with the same numbers
    "autoencoder": Method(pretrained),
    "denoising": Method(pretrained_denoising),
    "label smoothing": Method(local, smoothing=0.1),
    "goodness": Method(forward_forward, "goodness"),
}
for head in (
    "pooled_linear", "similarity", "similarity_projected", "predsim", "predsim_projected", "contrastive",
    "conv", "mlp_sr", "auglocal", "reconstruction", "infopro", "infopro_contrastive",
):  # fmt: skip
    METHODS[head] = Method(local, head)


def leaky_relu() -> nn.Module:
    return nn.LeakyReLU(0.01)


def activation_of(method: Method) -> Callable[[], nn.Module]:
    """Leaky in similarity matching, as its paper has it."""
    return leaky_relu if "sim" in method.head else nn.ReLU


def digits(batch_size: int, seed: int) -> tuple[data.MemoryLoader, data.MemoryLoader, data.Normalization]:
    """scikit-learn's digits, 8x8: for training, shuffled, and for the test."""
    train, test = data.load("digits"), data.load("digits", split="test")
    normalization = data.Normalization.of(train.images)
    training = data.MemoryLoader(train, batch_size, normalization, shuffle=True, drop_last=True, seed=seed)
    return training, data.MemoryLoader(test, len(test.labels), normalization), normalization


def run(
    name: str, config: Sequence[int | str], hidden: int, *, epochs: int, batch_size: int, lr: float, seed: int
) -> tuple[float, list[float]]:
    """Accuracy on the test images of digits, and the loss of each head in the last epoch."""
    torch.manual_seed(seed)
    training, test, normalization = digits(batch_size, seed)
    method = METHODS[name]
    stages = network(
        layers(config, hidden, activation_of(method)),
        method.head,
        smoothing=method.smoothing,
        normalization=normalization,
    )
    history = method.train(stages, training, epochs, lambda parameters: torch.optim.Adam(parameters, lr))
    return accuracy(stages, test), history[-1]
