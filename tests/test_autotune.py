"""Choice between convolutions by measurement: its interface, and (--backend=simt) what it chooses between."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import backends
import layerwise_ext as lw
import pytest
import torch
from layerwise_ext import functional
from operator_cases import quarters
from torch import Tensor

simulated = pytest.mark.skipif(backends.installed() != "simt", reason="for --backend=simt, which has stand-ins")
DTYPES = [torch.bfloat16, torch.float16]
NAMES = ["stand-in of 128 pixels", "stand-in of 64 pixels", "stand-in that fails"]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    enabled, choices = lw.autotune.enabled(), lw.autotune.choices()
    yield
    (lw.autotune.enable if enabled else lw.autotune.disable)()
    lw._ops._C.set_autotune_choices(choices)


def test_off_until_it_is_turned_on() -> None:
    assert not lw.autotune.enabled()
    lw.autotune.enable()
    assert lw.autotune.enabled()
    lw.autotune.disable()
    assert not lw.autotune.enabled()


def test_choices_are_saved_and_loaded(tmp_path: Path) -> None:
    lw._ops._C.set_autotune_choices({"a device, a shape": "library", "another": "kernel"})
    path = tmp_path / "choices.json"
    lw.autotune.save(path)
    lw.autotune.clear()
    assert lw.autotune.choices() == {}
    lw._ops._C.set_autotune_choices({"another": "library", "a third": "library"})
    lw.autotune.load(path)
    assert lw.autotune.choices() == {"a device, a shape": "library", "another": "kernel", "a third": "library"}
    assert [p.name for p in tmp_path.iterdir()] == ["choices.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '"library"'])
def test_a_file_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "choices.json"
    path.write_text(text)
    lw._ops._C.set_autotune_choices({"a": "library"})
    with pytest.raises(ValueError, match=r"choices\.json .*autotune.save"):
        lw.autotune.load(path)
    with pytest.raises(FileNotFoundError):
        lw.autotune.load(tmp_path / "none.json")
    assert lw.autotune.choices() == {"a": "library"}


# -- What is chosen between --------------------------------------------------------------------------------------------


@pytest.fixture
def switches() -> Iterator[Any]:
    library = ctypes.CDLL(str(backends.build() / "layerwise_simt.so"))
    library.simt_forget()
    library.simt_autotune(True)
    yield library
    library.simt_let_fail(False)
    library.simt_autotune(False)
    library.simt_forget()


def run(dtype: torch.dtype, channels: tuple[int, int] = (8, 16), mean: float = 0.0, **options: Any) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    x = quarters(3, channels[0], 9, 11, generator=g).to(dtype).contiguous(memory_format=torch.channels_last)
    w = quarters(channels[1], channels[0], 3, 3, generator=g, limit=2).float().requires_grad_()
    running_mean, running_var = torch.zeros(channels[1]), torch.ones(channels[1])
    with torch.autocast("cpu", dtype):
        m = functional.conv_bn_act_moments(
            x + mean, w, None, running_mean, running_var, training=True, bins=2, **{"padding": 1, **options}
        )
    (gradient,) = torch.autograd.grad(m.m1.square().sum(), w)
    return [m.y.detach().float(), m.m1.detach(), running_mean, running_var, gradient]


@simulated
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 0, "dilation": 2}, {"mean": 64.0}], ids=str)
@pytest.mark.parametrize("kernel", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolution_that_sums(dtype: torch.dtype, kernel: int, options: dict[str, Any], switches: Any) -> None:
    """The result is that of the library's convolution and of the statistics kernel, up to the rounding of z."""
    switches.simt_autotune(False)
    expected = run(dtype, **options)
    switches.simt_autotune(True)
    run(dtype, **options)
    assert switches.simt_choose(NAMES[kernel].encode()) == 1
    before = switches.simt_fused_runs(kernel)
    actual = run(dtype, **options)
    assert switches.simt_fused_runs(kernel) == before + 1
    rounding = torch.finfo(dtype).eps
    for ours, theirs in zip(actual, expected, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=4 * rounding, atol=4 * rounding * scale)


@simulated
def test_a_shape_is_measured_once(switches: Any) -> None:
    before = [switches.simt_fused_runs(kernel) for kernel in range(3)]
    for _ in range(3):
        run(torch.bfloat16)
    text = ctypes.create_string_buffer(500)
    switches.simt_choice(text, 500)
    what, way = text.value.decode().rsplit(": ", 1)
    assert what == ("simulator, BFloat16 [3, 8, 9, 11] * [16, 8, 3, 3], stride 1x1, padding 1x1, dilation 1x1")
    assert way in ["library", *NAMES[:2]]
    after = [switches.simt_fused_runs(kernel) for kernel in range(3)]
    assert sum(after) - sum(before) == 2 + (3 if way != "library" else 0)
    run(torch.float16)
    assert switches.simt_choose(b"library") == 2


@simulated
def test_a_convolution_that_fails_is_an_error(switches: Any) -> None:
    """It said that it could do it: hiding that would hide a bug, or a broken device."""
    switches.simt_let_fail(True)
    with pytest.raises(RuntimeError, match="the stand-in fails"):
        run(torch.bfloat16)
    assert switches.simt_choose(b"library") == 0  # nothing was remembered


@simulated
def test_a_choice_of_another_build_is_measured_anew(switches: Any) -> None:
    run(torch.bfloat16)
    switches.simt_choose(b"a kernel that is not here")
    before = switches.simt_fused_runs(0)
    run(torch.bfloat16)
    assert switches.simt_fused_runs(0) > before


@simulated
@pytest.mark.parametrize("case", ["float32", "channels", "groups", "off"])
def test_what_only_the_library_does(case: str, switches: Any) -> None:
    before = [switches.simt_fused_runs(kernel) for kernel in range(3)]
    if case == "off":
        switches.simt_autotune(False)
        run(torch.bfloat16)
    elif case == "channels":
        run(torch.bfloat16, channels=(6, 16))
    elif case == "groups":
        x = torch.randn(2, 16, 5, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        functional.conv_bn_act(x, torch.randn(16, 8, 3, 3, dtype=torch.bfloat16), training=True, groups=2)
    else:
        x = torch.randn(2, 16, 5, 5).contiguous(memory_format=torch.channels_last)
        functional.conv_bn_act(x, torch.randn(16, 16, 3, 3), training=True)
    assert [switches.simt_fused_runs(kernel) for kernel in range(3)] == before
    assert switches.simt_choose(b"library") == 0
