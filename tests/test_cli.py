import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from stellar_fast import StellarModel, backend, drop_tokens
from stellar_fast.cli import app, main
from stellar_fast.data import eval_transform, load_image
from stellar_fast.fidelity import error_map, fidelity
from stellar_fast.visualize import psnr, to_pixels

COMMANDS = ("info", "train", "train-decoder", "encode", "reconstruct", "visualize", "demo", "inspect", "tune")
SMALL = [
    *("--encoder", "image_size=32", "--encoder", "hidden_size=48", "--encoder", "num_hidden_layers=2"),
    *("--encoder", "intermediate_size=96", "--model", "num_masks=2", "--model", "num_local_crops=2"),
    *("--model", "num_clusters=32", "--device", "cpu", "--batch-size", "4", "--workers", "0"),
]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of pictures, two names that differ in their extension alone, and a file that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("a/0.png", "a/0.jpg", "a/1.png", "b/2.png", "b/3.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 48), Image.Resampling.BICUBIC).save(folder / name)
    (folder / "b" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    good = tmp_path_factory.mktemp("good")
    for path in photos.rglob("?.png"):
        (good / path.name).write_bytes(path.read_bytes())
    result = invoke("train", "--data", good, "--out", folder, "--steps", 2, "--log-every", 1, *SMALL)
    assert result.exit_code == 0, result.output
    assert "finished step 2" in result.output
    return folder


def test_an_error_in_a_worker_ends_the_command(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    arguments = [*SMALL[:-1], "2", "--batch-size", "2", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "stellar_fast.cli", "train", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert "images in" in ended.stderr and "are unreadable" in ended.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_a_working_example(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    example = re.search(rf"Example: (stellar-fast {command}[^│]*?)\n\s*\n", plain(result.output))
    assert example is not None, result.output
    for option in re.findall(r"--[\w-]+", example[1]):
        assert plain(result.output).count(option) >= 2, f"{option} of the example is not an option"
    assert re.search(r"exit code", plain(result.output), re.IGNORECASE)


def test_info_names_versions_devices_and_backends() -> None:
    result = invoke("info")
    assert result.exit_code == 0
    for text in (torch.__version__, "prototype_cross_entropy", "reference", "Native module", "CUDA"):
        assert text in result.output


def test_info_says_why_a_backend_of_an_operator_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.OPS, "koleo", ("xformers", "reference"))
    monkeypatch.setattr(backend, "why_not", lambda name: "not\\[built]" if name == "xformers" else "")
    lines = plain(invoke("info").output).splitlines()
    (koleo,) = [line for line in lines if "koleo" in line]
    number = re.search(r"xformers (\(\d+\))", koleo)
    assert number and f"  {number[1]} not\\[built]" in lines
    monkeypatch.setenv("STELLAR_FAST_BACKEND", "koleo=xformers")
    lines = plain(invoke("info").output).splitlines()
    assert any("koleo" in line and "none (" in line for line in lines)
    assert any(line.endswith("'xformers' was asked for, but not\\[built]; koleo can use: reference") for line in lines)


def test_encode_writes_features_and_names(run: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "features.safetensors"
    result = invoke("encode", "--images", photos, "--weights", run, "--out", out, "--batch-size", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "cannot read image" in result.stderr and "broken.png" in result.stderr
    with safe_open(out, "pt") as file:
        names = json.loads(file.metadata()["names"])
        features = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert names == ["a/0.jpg", "a/0.png", "a/1.png", "b/2.png", "b/3.png"]
    assert {name: tuple(t.shape) for name, t in features.items()} == {
        "sparse": (5, 16, 48),
        "spatial": (5, 16, 16),
        "cls": (5, 1, 48),
    }
    encoder = StellarModel.from_pretrained(run / "checkpoints" / "step_00000002").encoder
    with torch.no_grad():
        expected = encoder(eval_transform(load_image(photos / "b" / "2.png"), 32)[None])
    torch.testing.assert_close(features["sparse"][3:4], expected.sparse, rtol=1e-4, atol=1e-5)
    assert [path.name for path in out.parent.iterdir()] == ["features.safetensors"]


def test_results_are_written_though_nothing_is_printed(run: Path, photos: Path, tmp_path: Path) -> None:
    line = f"exec {sys.executable} -m stellar_fast.cli {{}} --images {photos}/b --weights {run} --device cpu --out "
    commands = [
        line.format("encode") + "full >/dev/full",
        line.format("encode") + "closed <&- >&- 2>&-",
        line.format("reconstruct") + "ascii",
    ]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(["bash", "-c", c], cwd=tmp_path, env=environment, **pipes) for c in commands]
    printed = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], printed
    for name in ("full", "closed"):
        with safe_open(tmp_path / name, "pt") as file:
            assert json.loads(file.metadata()["names"]) == ["2.png", "3.png"]
    reason = "No space left on device"
    assert printed[0][1].endswith(f"warning: standard output takes no more, what is printed is lost: {reason}\n")
    assert len(json.loads((tmp_path / "ascii" / "metrics.json").read_text())["images"]) == 2
    assert "| 2.png | " in printed[2][0] and printed[2][0].endswith("2 pictures in ascii\n")


def test_reconstruct_shows_and_measures(run: Path, photos: Path, tmp_path: Path) -> None:
    arguments = ("reconstruct", "--images", photos / "a", "--weights", run, "--device", "cpu")
    assert invoke(*arguments, "--out", tmp_path / "tokens").exit_code == 0
    result = invoke(
        *arguments, "--out", tmp_path / "strips", "--no-tokens", "--size", 37
    )  # 32, and 5 that are not seen
    assert result.exit_code == 0, result.output
    names = ["0.jpg.png", "0.png.png", "1.png.png", "metrics.json"]
    for folder in ("tokens", "strips"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
    with Image.open(tmp_path / "strips" / "1.png.png") as picture:
        pixels = np.asarray(picture)
    original, rebuilt, error = np.split(pixels, 3, axis=1)
    seen = eval_transform(load_image(photos / "a" / "1.png"), 37)[:, :32, :32]
    np.testing.assert_array_equal(original, seen.permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(error, error_map(original, rebuilt))
    found = fidelity(original, rebuilt)
    assert re.search(rf"1\.png *│ *{found.psnr_db:.2f} *│ *{found.ssim:.4f}", result.output)
    record = json.loads((tmp_path / "strips" / "metrics.json").read_text())
    assert [image["name"] for image in record["images"]] == ["0.jpg", "0.png", "1.png"]
    assert record["images"][2] == {"name": "1.png", "psnr_db": found.psnr_db, "ssim": found.ssim, "token_psnr_db": []}
    mean = sum(image["psnr_db"] for image in record["images"]) / 3
    assert record["mean"]["psnr_db"] == mean and f"mean PSNR {mean:.2f} dB, SSIM " in result.output


def test_reconstruct_shows_what_each_token_adds(run: Path, photos: Path, tmp_path: Path) -> None:
    path = photos / "b" / "2.png"
    arguments = ("reconstruct", "--images", path, "--weights", run, "--device", "cpu", "--batch-size", 3)
    assert invoke(*arguments, "--out", tmp_path).exit_code == 0
    (record,) = json.loads((tmp_path / "metrics.json").read_text())["images"]
    model = StellarModel.from_pretrained(run / "checkpoints" / "step_00000002")
    image = eval_transform(load_image(path), 32)[None]
    features = model.encode(image)
    expected = [
        psnr(to_pixels(image[0]), to_pixels(model.reconstruct(drop_tokens(features, k))["reconstruction"][0]))
        for k in range(16)
    ]
    np.testing.assert_allclose(record["token_psnr_db"], expected, rtol=1e-3)
    with Image.open(tmp_path / "2.png.png") as panel:
        assert panel.width == 1280 and panel.height > 413 + 2 * 150


def test_a_decoder_trains_on_a_frozen_encoder(run: Path, photos: Path, tmp_path: Path) -> None:
    out, pictures = tmp_path / "decoder", tmp_path / "pictures"
    small = ["--decoder", "num_hidden_layers=1", "--decoder", "hidden_size=32", "--decoder", "intermediate_size=64"]
    options = [*small, "--device", "cpu", "--batch-size", 2, "--workers", 0]
    result = invoke("train-decoder", "--data", photos / "a", "--weights", run, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert "finished step 20" in result.output  # 20 epochs of one batch
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["decoder_only"], config["epochs"], config["weights"]) == (True, 20, str(run))
    for place in (("--config", out / "config.yaml"), ("--out", out)):
        resumed = invoke("train-decoder", *place, "--resume")
        assert resumed.exit_code == 0 and "finished step 20" in resumed.output, resumed.output
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    refused = invoke("train-decoder", "--config", copy / "config.yaml", "--resume")
    said = f"{copy}/config.yaml lies in a run's folder and names another one, {out}: say which is to continue, "
    assert f"{said}--out {copy} or --out {out}" in " ".join(refused.output.split())
    there = invoke("train-decoder", "--config", copy / "config.yaml", "--resume", "--out", copy)
    assert there.exit_code == 0 and f"checkpoint {copy}/" in there.output, there.output
    both = [
        StellarModel.from_pretrained(next((folder / "checkpoints").iterdir())).encoder.state_dict()
        for folder in (run, out)
    ]
    assert all(torch.equal(tensor, both[1][name]) for name, tensor in both[0].items())
    for command in ("reconstruct", "visualize"):
        arguments = (
            "--images",
            photos / "b" / "3.png",
            "--weights",
            out,
            "--out",
            pictures / command,
            "--device",
            "cpu",
        )
        more = ["--reconstruction"] if command == "visualize" else []
        result = invoke(command, *arguments, "--device", "cpu", *more)
        assert result.exit_code == 0, result.output


def test_visualize_draws_a_panel_an_image(run: Path, photos: Path, tmp_path: Path) -> None:
    common = ("visualize", "--weights", run, "--device", "cpu", "--out", tmp_path)
    result = invoke(*common, "--images", photos / "b" / "3.png")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "3.png.png") as panel:
        height = panel.height
    assert invoke(*common, "--images", photos / "b" / "3.png", "--reconstruction").exit_code == 0
    with Image.open(tmp_path / "3.png.png") as panel:
        assert panel.height != height


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("encode --images /no/where --weights {run} --out {out}", "/no/where is not a folder"),
        ("encode --images {photos} --weights /no/where --out {out}", "/no/where is neither a file"),
        ("encode --images {photos} --weights {run} --out {out} --size 3", "hold no patch of 8x8"),
        ("encode --images {photos} --weights {run} --out {out} --batch-size 0", "batch size 0"),
        ("encode --images {photos} --weights {run} --out {out} --device tpu", "got 'tpu'"),
        ("encode --images {photos} --weights {run} --out {out} --device cuda:99", "device cuda:99 is not there"),
        ("reconstruct --images {photos}/b/broken.png --weights {run} --out {out}", "none of the 1 images"),
        ("visualize --images {photos} --weights {run} --out {photos}", "would mix with them"),
        ("train --data {photos} --out {out} --preset b17", "unknown preset 'b17'"),
        ("train --data /no/where --out {out}", "/no/where is not a folder"),
        ("train --data {photos}", "out is empty"),
        ("train --data {photos} --out {out} --device gpu", "got 'gpu'"),
        ("train --data {photos} --out {out} --encoder image_size=big", "image_size must be a whole number, got 'big'"),
        ("train --data {photos} --out {out} --encoder image_size", "--encoder takes KEY=VALUE"),
        ("train --data {photos} --out {out} --model masks=2", "did you mean num_masks"),
        ("train --config /no/where.yaml", "/no/where.yaml"),
        ("train --data {photos} --out {run} --batch-size 2", "already holds a run"),
        ("train-decoder --data {photos} --out {out}", "weights is empty: name those of the encoder"),
        ("train-decoder --data {photos} --out {out} --weights {photos}", "no config.json"),
        ("train-decoder --data {photos} --out {out} --weights {run} --vq-model /no/vq.bin", "no weights file at /no"),
        ("reconstruct --images {photos} --weights {run} --out {out} --size 9", "an image of 8x8 has no SSIM"),
    ],
)
def test_a_users_error_is_one_line(run: Path, photos: Path, tmp_path: Path, arguments: str, message: str) -> None:
    result = invoke(*arguments.format(run=run, photos=photos, out=tmp_path / "out").split())
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: cannot read image")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], result.stderr


def test_a_mistyped_option_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["train", "--dat", "x"], "--dat"),
        (["encode", "--size", "big"], "--size"),
        (["x"], "'x'"),
    ):
        monkeypatch.setattr(sys, "argv", ["stellar-fast", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line


def test_a_bug_keeps_its_traceback(run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stellar_fast.data.eval_transform", lambda image, size: torch.zeros(3, 8, 8).view(5))
    result = invoke("encode", "--images", photos, "--weights", run, "--out", tmp_path / "f", "--device", "cpu")
    assert isinstance(result.exception, RuntimeError) and "shape" in str(result.exception)


def test_ctrl_c_saves_and_the_printed_line_continues(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "stellar_fast.cli", "train", "--data", str(photos / "a"), "--out", str(out)]
    process = subprocess.Popen(
        [*command, *SMALL, "--batch-size", "2", "--workers", "2", "--steps", "100000", "--log-every", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: the workers get it too
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    line = next(line.strip() for line in output.splitlines() if "--resume" in line)
    assert line == f"stellar-fast train --config {out}/config.yaml --resume"
    step = int(re.search(r"stopped at step (\d+)", output)[1])
    assert (out / "checkpoints" / f"step_{step:08d}" / "meta.json").exists()
    # a resumed run keeps its length; a signal at once shows that it went on from there
    again = subprocess.Popen(
        [sys.executable, "-m", "stellar_fast.cli", *line.split()[1:], "--workers", "0"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while json.loads(metrics.read_text().splitlines()[-1])["step"] <= step:
        assert again.poll() is None and time.monotonic() < deadline + 300
        time.sleep(0.05)
    again.terminate()
    again.terminate()  # as supervisors do: the save goes on
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 143, output
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] > step
