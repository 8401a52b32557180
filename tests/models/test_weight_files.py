"""Files that bear a weights' name: what can be read is, and of the rest one sentence says what it is."""

import argparse
import gzip
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stellar_fast import StellarEncoder
from stellar_fast.models.vit_weights import load_vit_state_dict
from stellar_fast.models.weight_files import load_tensors

TENSORS = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}


def assert_read(path: Path) -> None:
    found = load_tensors(path)
    assert found.keys() >= TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin", "weights", "a b.pth.tar"])
def test_what_a_file_begins_with_decides(tmp_path, name):
    for save in (save_file, torch.save, lambda t, f: torch.save(t, f, _use_new_zipfile_serialization=False)):
        save(TENSORS, tmp_path / name)
        assert_read(tmp_path / name)


def test_values_beside_the_weights(tmp_path):
    """What DINO and MAE keep beside theirs: a Namespace, and numbers of NumPy."""
    path = tmp_path / "checkpoint.pth"
    beside = {"args": argparse.Namespace(lr=0.1, out="x"), "lr": np.float64(0.5), "epoch": np.int64(3), "t": (1, None)}
    torch.save(TENSORS | beside, path)
    before = torch.serialization.get_safe_globals()
    assert_read(path)
    assert load_tensors(path)["args"].out == "x"
    assert torch.serialization.get_safe_globals() == before
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        assert_read(path)
        assert argparse.Namespace in torch.serialization.get_safe_globals(), "what the user allowed stays allowed"
    finally:
        torch.serialization.clear_safe_globals()


class Settings:
    pass


class Danger:
    def __reduce__(self):
        return (os.system, ("echo this ran > ran",))


@pytest.mark.parametrize(
    ("held", "named"),
    [
        (TENSORS | {"settings": Settings()}, rf"{__name__}\.Settings"),
        (TENSORS | {"path": Path("x")}, r"pathlib\.\w+"),
        (TENSORS | {"danger": Danger()}, r"posix\.system"),
        (nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        (TENSORS | {"array": np.zeros(3)}, r"numpy\.\w+\.multiarray\._reconstruct"),
    ],
    ids=["settings", "path", "danger", "module", "array"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_objects_are_refused_in_one_sentence(tmp_path, monkeypatch, held, named, zipped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=rf"^cannot read weights from {path}: it holds Python objects \({named}\)"
    ) as error:
        load_tensors(path)
    message = str(error.value)
    assert "\n" not in message and "\033" not in message and len(message) < 400 + len(str(path))
    assert not (tmp_path / "ran").exists()


def zipped(**files: bytes):
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)

    return write


def saved(save, part: slice):
    """Some bytes of what `save` writes."""

    def write(path: Path) -> None:
        save(TENSORS | {"c": torch.zeros(5000)}, path)
        path.write_bytes(path.read_bytes()[part])

    return write


def legacy(tensors: dict, path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def script(path: Path) -> None:
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(path))


FILES = {
    "empty": (lambda path: path.touch(), "it is empty"),
    "lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "pointer of Git LFS",
    ),
    "html": (lambda path: path.write_text("\n<!DOCTYPE html>\n<html>404"), "a web page or XML"),
    "xml": (lambda path: path.write_text('<?xml version="1.0"?><Error>'), "a web page or XML"),
    "json": (lambda path: path.write_text('{"weight_map": {}}'), "JSON text"),
    "text": (lambda path: path.write_text("hello world\n" * 50), "damaged, cut short, or neither"),
    "zeros": (lambda path: path.write_bytes(bytes(2000)), "damaged, cut short, or neither"),
    "noise": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(2000)), "damaged, cut short, or neither"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x" * 999)), "gzip data: unpack it first"),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(900)), "HDF5"),
    "numpy": (lambda path: np.save(path.open("wb"), np.zeros(3)), "a NumPy array"),
    "npz": (lambda path: np.savez(path.open("wb"), x=np.zeros(3)), r"a zip archive of x\.npy: unpack"),
    "zip": (zipped(**{"m/weights.bin": b"x", "m/readme": b"y"}), r"a zip archive of m/weights\.bin, m/readme: unpack"),
    "torchscript": (script, r"a TorchScript program, not weights: save its state_dict\(\)"),
    "half a zip": (saved(torch.save, slice(9000)), "cut short or damaged: .* after 9,000 bytes"),
    "half a pickle": (saved(legacy, slice(9000)), "damaged, cut short"),
    "the start of a pickle": (saved(legacy, slice(40)), "damaged, cut short"),
    "half of safetensors": (saved(save_file, slice(9000)), r"safetensors of 9,000 bytes, cut short or damaged \("),
    "the start of safetensors": (saved(save_file, slice(30)), r"safetensors of 30 bytes, cut short or damaged \("),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_weights(tmp_path, kind):
    write, message = FILES[kind]
    for name in ("weights.bin", "weights.safetensors"):
        path = tmp_path / name
        write(path)
        with pytest.raises(ValueError, match=f"^cannot read weights from {path}: .*{message}") as error:
            load_tensors(path)
        assert "\n" not in str(error.value)


def test_what_is_no_file_of_tensors_by_name(tmp_path):
    path = tmp_path / "weights.pt"
    for held, kind in (([torch.zeros(2)], "list"), (torch.zeros(2), "Tensor"), (3, "int")):
        torch.save(held, path)
        with pytest.raises(ValueError, match=f"^{path} holds a {kind}, not tensors by name$"):
            load_tensors(path)
    with pytest.raises(ValueError, match=f"^{tmp_path} is a folder, not a file of weights$"):
        load_tensors(tmp_path)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(ValueError, match=r"pipe\.pt is no regular file"):
        load_tensors(tmp_path / "pipe.pt")
    with pytest.raises(FileNotFoundError, match=r"no weights file at .*/gone\\n\.pt$"):
        load_tensors(tmp_path / "gone\n.pt")
    with pytest.raises(ValueError, match="the path of the weights is empty"):
        load_tensors("")


def test_a_file_that_holds_itself_ends(tmp_path):
    itself: dict = {"step": 1}
    itself["state_dict"] = itself["model"] = itself
    torch.save(itself, tmp_path / "itself.pt")
    with pytest.raises(RuntimeError, match="missing tensors"):
        StellarEncoder.from_pretrained(tmp_path / "itself.pt", model="tiny")
    with pytest.raises(RuntimeError, match="missing tensors"):
        load_vit_state_dict(StellarEncoder("tiny"), load_tensors(tmp_path / "itself.pt"))
