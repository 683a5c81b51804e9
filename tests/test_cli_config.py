"""Configuration files of the command line: the same options, the same checks, flags over files."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
from layerwise_ext import cli
from layerwise_ext.cli import config, options

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
needs_page = pytest.mark.skipif(not PAGE.is_file(), reason="docs/ is not beside tests/")


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def parsed(*arguments: str) -> dict[str, Any]:
    """All options of a call of train."""
    return vars(config.complete(cli.build_parser().parse_args(["train", *arguments])))


def refused(path: Path) -> str:
    with pytest.raises(cli.UsageError) as error:
        config.read(path)
    return str(error.value)


YAML = """
model: [32, M, 64]
batch-size: 16
lr: 5e-4            # a text to YAML
lr_milestones: [2, 3]
blocks: 3
plain: true
limit_train: null
data-dir: /data
"""
TOML = """
model = [32, "M", 64]
batch-size = 16
lr = 5e-4
lr_milestones = [2, 3]
blocks = 3
plain = true
data-dir = "/data"
"""


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.yml", YAML), ("a.toml", TOML)])
def test_a_file_is_a_command_line(tmp_path: Path, name: str, text: str) -> None:
    path = str(write(tmp_path, text, name))
    flags = ["--model", "32,M,64", "--batch-size", "16", "--lr", "0.0005", "--lr-milestones", "2,3", "--blocks", "3",
             "--plain", "--data-dir", "/data"]  # fmt: skip
    expected = parsed(*flags)
    assert parsed(path) == {**expected, "config": Path(path)}
    assert expected["data_dir"] == Path("/data") and expected["epochs"] == 10 and expected["limit_train"] is None
    over = parsed("--lr", "0.1", path, "--no-plain", "--epochs", "3")
    assert over == {**expected, "config": Path(path), "lr": 0.1, "plain": False, "epochs": 3}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    given = parsed("--model", "8", "--blocks", "2,1", "--data-dir", "a: b", "--cutout", "3", "--seed", "-1",
                   "--lr", "1e-30", "--tensorboard", "--validation", "0.1")  # fmt: skip
    values = {name: given[name] for name in options.OPTIONS}
    read = config.read(write(tmp_path, config.dump(values)))
    assert read == {name: value for name, value in values.items() if value is not None}


@pytest.mark.parametrize(("text", "message"), [
    ("bach_size: 3", "unknown key 'bach_size'; did you mean 'batch_size'?"),
    ("xylophone: 3", "unknown key 'xylophone'; layerwise-ext train --help names those there are"),
    ("epochs: -1", "epochs: invalid positive int value: '-1'"),
    ("epochs: 1.5", "epochs: invalid positive int value: '1.5'"),
    ("epochs: true", "epochs is True; allowed: a number, a text, or a list of them"),
    ("lr: fast", "lr: invalid positive float value: 'fast'"),
    ("lr: .inf", "lr: invalid positive float value: 'inf'"),
    ("weight-decay: -1", r"weight_decay: invalid float \(0 or more\) value: '-1'"),
    ("validation: 1", r"validation: invalid fraction \(above 0, below 1\) value: '1'"),
    ("mode: backwards", r"mode: invalid choice: 'backwards' \(choose from '?joint'?, '?local'?, "),
    ("plain: 'yes'", "plain is 'yes'; allowed: true, false"),
    ("model: {a: 1}", "model is {'a': 1}; allowed: a number, a text, or a list of them"),
    ("model: [8, [M]]", r"model is \[8, \['M'\]\]; allowed: a number"),
    ("lr: 1\nlr: 2", "'lr' is there twice"),
    ("batch_size: 1\nbatch-size: 1", "'batch_size' is there twice"),
    ("- lr", "holds a list; a table of options such as 'epochs: 10' is needed"),
    ("lr: [1", "not YAML \\(while parsing a flow sequence"),
])  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    assert re.match(re.escape(f"{path}: ") + message, refused(path)), refused(path)


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not TOML" in refused(write(tmp_path, "lr: 1", "a.toml"))
    assert "must end in .yaml, .yml or .toml" in refused(write(tmp_path, "lr: 1", "a.txt"))
    assert "cannot be read (No such file or directory)" in refused(tmp_path / "none.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"model: \xff")
    assert f"{path}: cannot be read" in refused(path)
    assert cli.main(["train", str(write(tmp_path, "bach_size: 3"))]) == 2
    assert "did you mean 'batch_size'?" in capsys.readouterr().err


@needs_page
@pytest.mark.parametrize(("given", "expected"), [
    ({}, options.SMALL_MODEL), ({"data": "mnist"}, "vgg8b"), ({"model": "cnn"}, "cnn")
])  # fmt: skip
def test_the_default_network_fits_the_images(given: dict[str, str], expected: str) -> None:
    assert config.complete(argparse.Namespace(config=None, **given)).model == expected


def test_every_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in options.OPTIONS:
        assert f"`--{name.replace('_', '-')}`" in text, name
    for name in (*options.MODES, *options.HEADS):
        assert f"`{name}`" in text, name
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "(default: None)" not in capsys.readouterr().out


@needs_page
def test_the_example_of_the_docs_is_read(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (example_toml,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert config.read(write(tmp_path, example)) == config.read(write(tmp_path, example_toml, "a.toml")) != {}
