"""What the study of depth found."""

from __future__ import annotations

from layerwise_ext.studies.study import Cell, Finding, Results, Summary, Table, compare, compare_steps
from layerwise_ext.studies.words import points

# Method and downsampling of what is compared at every depth.
ARMS = {
    "joint": ("joint", "standard"),
    "local": ("local", "standard"),
    "local-accelerated": ("local", "accelerated"),
    "joint-accelerated": ("joint", "accelerated"),
}
# Those that the question is about; the other one is a control.
ASKED = ("joint", "local", "local-accelerated")
# The other way to train a deep network in little memory; its accuracy is that of joint training.
CHECKPOINTED = "joint-checkpointed"
# The share of a difference that must be closed before it counts as fixed, however large the spread of the rest is.
MOST = 0.8
# Of which a step is measured.
MEASURED = (*ASKED, CHECKPOINTED)
NAMES = {
    "joint": "joint",
    CHECKPOINTED: "joint, checkpointed",
    "local": "local",
    "local-accelerated": "local, accelerated",
    "joint-accelerated": "joint, accelerated",
    "local-pred": "local, pred",
}
PHRASES = {
    "joint": "joint training",
    CHECKPOINTED: "checkpointed joint training",
    "local": "local training",
    "local-accelerated": "local training with accelerated downsampling",
    "joint-accelerated": "joint training with accelerated downsampling",
    "local-pred": "local training on pred alone",
}


def table(results: Results) -> Table:
    header = ["network", "test accuracy, %", "behind joint, points", "probe, first third, %", "probe, last stage, %",
              "forward pass, MMAC", "kept, MiB", "step, ms", "peak of a step, MiB"]  # fmt: skip
    rows = []
    for cell in results.cells:
        measured = results.measured.get(cell.name, {})
        steps = [f"{measured[key]:.1f}" if key in measured else "" for key in ("step_ms", "peak_mib")]
        if not cell.trained:
            rows.append([_label(cell), "as joint", *[""] * 5, *steps])
            continue
        behind = ""
        if cell.options["arm"] != "joint":
            behind = _paired(results, joint_of(results, cell), cell).text(100)
        rows.append([
            _label(cell),
            results.summary(cell, "accuracy").text(100),
            behind,
            results.summary(cell, "shallow_probe").text(100),
            results.summary(cell, "last_probe").text(100),
            f"{results.values(cell, 'multiply_adds')[0] / 1e6:.1f}",
            f"{results.values(cell, 'kept_mib')[0]:.1f}",
            *steps,
        ])  # fmt: skip
    caption = (
        "Means over seeds ± half of the spread. Behind joint: behind joint training of the standard network of the "
        "same depth, seed by seed. Probe: accuracy of linear probes. MMAC: millions of multiply-adds for an image."
    )
    return Table(header, rows, caption)


def findings(results: Results) -> list[Finding]:
    deepest = depths_of(results)[-1]
    at = dict(at_depth(results, deepest))
    pairs = [("local", "joint"), ("local-accelerated", "local")]

    def names(first: str, second: str) -> tuple[str, str]:
        return f"{PHRASES[first]} ({deepest} layers)", PHRASES[second]

    found = [_degrades(results, "local"), _fixes(results)]
    if "joint-accelerated" in at:
        first, second = "joint-accelerated", "joint"
        found.append(compare(results, at[first], at[second], names=names(first, second)))
    for arm in ASKED:
        ends = of_arm(results, arm)
        deep, shallow = (f"{PHRASES[arm]} with {cell.options['depth']} layers" for cell in (ends[-1], ends[0]))
        found.append(compare(results, ends[-1], ends[0], names=(deep, shallow)))
    if len(results.select(arm="local-pred")) > 1:
        found.append(_degrades(results, "local-pred"))
    for pair in pairs:
        what = "accuracy of linear probes behind the first third of the stages"
        found.append(compare(results, at[pair[0]], at[pair[1]], "shallow_probe", names=names(*pair), what=what))
    found += _intensity(results)
    (at[CHECKPOINTED],) = results.select(arm=CHECKPOINTED, depth=deepest)
    for pair in [(CHECKPOINTED, "joint"), ("local", "joint"), ("local", CHECKPOINTED), ("local-accelerated", "local")]:
        found += compare_steps(results, at[pair[0]], at[pair[1]], names=names(*pair))
    return found


def depths_of(results: Results) -> list[int]:
    return sorted({cell.options["depth"] for cell in results.cells})


def at_depth(results: Results, depth: int) -> list[tuple[str, Cell]]:
    """Arms and cells of a depth that were trained, without those of other convolutions to a loss."""
    return [(cell.options["arm"], cell) for cell in results.select(depth=depth, convolutions=2) if cell.trained]


def of_arm(results: Results, arm: str) -> list[Cell]:
    """Cells of an arm, the shallowest first."""
    return sorted(results.select(arm=arm, convolutions=2), key=lambda cell: cell.options["depth"])


def intensities(results: Results) -> list[Cell]:
    """Local networks of one depth, by the number of convolutions to a loss."""
    depths = {cell.options["depth"] for cell in results.cells if cell.options["convolutions"] != 2}
    cells = [cell for depth in depths for cell in results.select(arm="local", depth=depth)]
    return sorted(cells, key=lambda cell: cell.options["convolutions"])


def joint_of(results: Results, cell: Cell) -> Cell:
    (joint,) = results.select(arm="joint", depth=cell.options["depth"])
    return joint


def _paired(results: Results, first: Cell, second: Cell) -> Summary:
    return Summary.of(results.paired(first, second, "accuracy"))


def _label(cell: Cell) -> str:
    options = cell.options
    every = "" if options["convolutions"] == 2 else f", {_convolutions(cell)}"
    return f"{options['depth']} layers, {NAMES[options['arm']]}{every}"


def _degrades(results: Results, arm: str) -> Finding:
    """Whether local training falls behind joint training as networks get deeper."""
    cells = of_arm(results, arm)
    ends = [results.paired(joint_of(results, cell), cell, "accuracy") for cell in (cells[0], cells[-1])]
    shallow, deep = (cell.options["depth"] for cell in (cells[0], cells[-1]))
    growth = Summary.of([b - a for a, b in zip(*ends, strict=True)])
    before, after = (Summary.of(values) for values in ends)
    sides = (
        f"With {shallow} layers {PHRASES[arm]} is {_against(before)} joint training, with {deep} layers "
        f"{_against(after)} it: how far it is behind changed by {points(growth)}"
    )
    claim = "that local training degrades with depth relative to joint training"
    if growth.seeds == 1:
        return Finding(f"{sides}. With one seed there is no spread, so this may be chance.", False)
    if not growth.differs(1 / results.test_images):
        return Finding(f"{sides}, not more than the spread. It was not found here {claim}.", False)
    if growth.mean > 0:
        return Finding(f"{sides}, more than the spread. The claim {claim} held here.", True)
    return Finding(f"{sides}: it catches up. The claim {claim} did not hold here.", True)


def _against(gap: Summary) -> str:
    """What joint training is ahead, seen from local training: '1.2 ± 0.3 points behind'."""
    return points(gap).lstrip("+-") + (" behind" if gap.mean > 0 else " ahead of")


def _fixes(results: Results) -> Finding:
    """Whether accelerated downsampling takes away what local training is behind in the deepest network."""
    depth = depths_of(results)[-1]
    at = dict(at_depth(results, depth))
    gap = _paired(results, at["joint"], at["local"])
    gain = _paired(results, at["local-accelerated"], at["local"])
    left = _paired(results, at["joint"], at["local-accelerated"])
    resolution = 1 / results.test_images
    sides = (
        f"With {depth} layers local training is {_against(gap)} joint training of the standard network; with "
        f"accelerated downsampling it is {_against(left)} it, a change of {points(gain)}"
    )
    claim = "that accelerated downsampling fixes layer-wise learning"
    if gain.seeds == 1:
        return Finding(f"{sides}. With one seed there is no spread, so this may be chance.", False)
    if not (gap.mean > 0 and gap.differs(resolution)):
        text = "Local training was not behind by more than the spread: there was nothing to fix, and the claim"
        return Finding(f"{sides}. {text} {claim}, could not be tested here.", False)
    if not gain.differs(resolution):
        return Finding(f"{sides}, not more than the spread. It was not found here {claim}.", False)
    if gain.mean < 0:
        return Finding(f"{sides}: it made local training worse. The claim {claim} did not hold here.", True)
    closed = f"{sides}. It closed {gain.mean / gap.mean:.0%} of the difference"
    if left.mean > 0 and left.differs(resolution):
        return Finding(f"{closed}: it helped, and did not fix it.", True)
    if gain.mean < MOST * gap.mean:
        text = "it helped, and as what is left does not exceed the spread, whether it fixed it cannot be told here."
        return Finding(f"{closed}: {text}", True)
    return Finding(f"{closed}, and what is left does not exceed the spread: the claim {claim} held here.", True)


def _intensity(results: Results) -> list[Finding]:
    cells = intensities(results)
    if len(cells) < 2:
        return []
    names = [f"local training with {_convolutions(cell)}" for cell in (cells[-1], cells[0])]
    return [compare(results, cells[-1], cells[0], names=(f"{names[0]} ({cells[0].options['depth']} layers)", names[1]))]


def _convolutions(cell: Cell) -> str:
    count = cell.options["convolutions"]
    return "a loss on each convolution" if count == 1 else f"a loss for every {count} convolutions"
