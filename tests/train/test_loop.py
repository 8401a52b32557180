import dataclasses
import errno
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from stellar_fast import StellarModel
from stellar_fast.data import MultiViewDataset, TooManyUnreadable, loader
from stellar_fast.data.loader import Key
from stellar_fast.files import lock_folder
from stellar_fast.train import NonFiniteLossError, RunEndedError, TrainConfig, loop, train
from stellar_fast.train.build import build_dataset, build_model
from stellar_fast.train.distributed import Ranks
from stellar_fast.train.loop import _Trainer

TIMES = ("seconds", "images_per_second")
TEACHER = {"momentum_teacher": True, "teacher_momentum": 0.9}


class SignalAt:
    """Sends this process a signal when the record of a step arrives."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def log(self, record: dict) -> None:
        if record["step"] == self.step:
            os.kill(os.getpid(), self.number)

    def close(self) -> None:
        pass


def change(config: TrainConfig, **values) -> TrainConfig:
    """The configuration with other values; tables are merged."""
    tables = {k: getattr(config, k) | v for k, v in values.items() if isinstance(v, dict)}
    return dataclasses.replace(config, **values | tables)


def numbers(config: TrainConfig) -> list[dict]:
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def test_a_run_learns_and_leaves_its_files(config: TrainConfig) -> None:
    config = change(config, steps=40, save_every=15, keep=2, lr=3e-3)
    result = train(config)
    records = numbers(config)
    assert [record["step"] for record in records] == list(range(1, 41))
    assert records[-1]["MSE"] < 0.7 * records[0]["MSE"]
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert {"lr", "grad_norm", "target_entropy", "prototypes_used", "mask_loss", "cls_loss"} <= records[0].keys()
    assert result.history == [r | {t: h[t] for t in TIMES} for r, h in zip(records, result.history, strict=True)]
    assert (result.step, result.skipped_steps, result.resume_command) == (40, 0, None)
    assert result.images_per_second > 0
    out = Path(config.out)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_00000030", "step_00000040"]
    assert TrainConfig.load(out / "config.yaml") == config
    saved = StellarModel.from_pretrained(result.checkpoint).state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in result.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({}, signal.SIGINT),
        ({"workers": 2}, signal.SIGTERM),
        ({"model": TEACHER, "accumulate": 3, "workers": 2}, signal.SIGHUP),
        ({"model": TEACHER, "precision": "bf16"}, signal.SIGUSR1),
    ],
    ids=["plain", "workers", "teacher-accumulate-workers", "teacher-bf16"],
)
def test_an_interrupted_run_continues_bit_for_bit(
    config: TrainConfig, tmp_path: Path, changes: dict, number: int
) -> None:
    config = change(config, **changes)
    whole = train(config)
    other = change(config, out=str(tmp_path / "other"))
    first = train(other, loggers=[SignalAt(2, number)])
    # the record of step 2 arrives while step 3 is under way, which is finished: in mid-epoch
    assert (first.step, first.signal) == (3, number)
    assert first.resume_command == f"stellar-fast train --config {other.out}/config.yaml --resume"
    torch.manual_seed(12345)  # whatever happens between must not matter
    second = train(TrainConfig.load(f"{other.out}/config.yaml", workers=2 - other.workers), resume=True)
    assert second.step == whole.step == 7 and second.resume_command is second.signal is None
    assert numbers(other) == numbers(config)
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.model.state_dict().items())


def test_resume_falls_back_to_the_newest_good_checkpoint(config: TrainConfig) -> None:
    whole = train(change(config, save_every=3))
    expected = numbers(config)
    checkpoints = Path(config.out) / "checkpoints"
    (whole.checkpoint / "train.pt").write_bytes(b"cut")
    shutil.copytree(checkpoints / "step_00000003", checkpoints / ".writing-step_00000009")
    with pytest.warns(UserWarning, match=r"checkpoint refused: .*step_00000007 is damaged: train\.pt"):
        again = train(config, resume=True)
    assert again.step == 7
    assert numbers(config) == expected
    for path in checkpoints.iterdir():
        (path / "meta.json").write_text("{}")
    reason = r"no good checkpoint in .*step_00000007 is not a checkpoint of stellar_fast"
    with warnings.catch_warnings(), pytest.raises(ValueError, match=reason):
        warnings.simplefilter("ignore")
        train(config, resume=True)


def test_a_finished_run_resumes_to_nothing(config: TrainConfig) -> None:
    first = train(config)
    again = train(config, resume=True)
    assert (again.step, again.checkpoint, again.history) == (first.step, first.checkpoint, [])


def test_resume_without_a_checkpoint_starts_and_says_so(config: TrainConfig) -> None:
    with pytest.warns(UserWarning, match="the run starts from the beginning"):
        assert train(change(config, steps=1), resume=True).step == 1


def test_a_folder_with_files_of_a_run_is_not_overwritten(config: TrainConfig) -> None:
    mine = Path(config.out) / "config.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# my notes")
    with pytest.raises(ValueError, match=r"config\.yaml was not written by a run of stellar_fast"):
        train(config)
    assert mine.read_text() == "# my notes"


def test_two_runs_in_one_folder_are_refused(config: TrainConfig) -> None:
    Path(config.out).mkdir(parents=True)
    held = lock_folder(Path(config.out))
    with pytest.raises(ValueError, match="is in use by another process"):
        train(config)
    held.close()


def test_a_resumed_run_does_not_need_the_weights_it_started_from(config: TrainConfig, tmp_path: Path) -> None:
    start = train(change(config, steps=1, out=str(tmp_path / "start"))).checkpoint
    shutil.copytree(start, tmp_path / "weights")
    config = change(config, steps=1, weights=str(tmp_path / "weights"))
    train(config)
    shutil.rmtree(tmp_path / "weights")
    assert train(config, resume=True).step == 1


def test_weights_may_be_named_from_another_folder(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(change(config, steps=1, out=str(tmp_path / "start")))
    monkeypatch.chdir(tmp_path)
    train(change(config, steps=1, weights="start"))  # a run's folder: its newest checkpoint
    monkeypatch.chdir("/")
    assert train(TrainConfig.load(f"{config.out}/config.yaml"), resume=True).step == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 2e-3}, r"made with lr 0.001, this run has 0.002"),
        ({"steps": 9}, r"made with steps 7, this run has 9"),
        ({"model": {"num_masks": 1}}, r"'num_masks': 2.*'num_masks': 1"),
        ({"batch_size": 2}, r"made with batch_size 4, this run has 2"),
    ],
)
def test_resume_with_another_config_is_refused(config: TrainConfig, changes: dict, message: str) -> None:
    train(config)
    with pytest.raises(ValueError, match=message):
        train(change(config, **changes), resume=True)


def test_resume_on_other_images_is_refused(config: TrainConfig, photos: Path, tmp_path: Path) -> None:
    train(config)
    moved = shutil.copytree(photos, tmp_path / "moved")
    assert train(change(config, data=str(moved)), resume=True).step == 7  # the same images in another place
    (moved / "0.png").rename(moved / "zero.png")
    with pytest.raises(ValueError, match="made with image_names"):
        train(change(config, data=str(moved)), resume=True)


def test_a_second_run_does_not_overwrite_the_first(config: TrainConfig) -> None:
    train(config)
    with pytest.raises(ValueError, match=r"already holds a run: continue it with --resume"):
        train(config)


def break_at(model: StellarModel, steps: set[int]) -> None:
    """Make koleo_loss NaN at these optimizer steps."""
    whole, count = model.loss, iter(range(1, 1000))

    def loss(predictions: dict):
        if next(count) in steps:
            predictions = predictions | {"koleo_loss": predictions["koleo_loss"] * float("nan")}
        return whole(predictions)

    model.loss = loss


def test_a_step_that_is_not_finite_changes_nothing(config: TrainConfig) -> None:
    config = change(config, steps=1)
    torch.manual_seed(0)
    model = build_model(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    break_at(model, {1})
    result = train(config, model=model)
    assert result.skipped_steps == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    state = torch.load(result.checkpoint / "train.pt", weights_only=True)
    assert all(s["step"] == 0 and not s["exp_avg"].any() for s in state["optimizer"]["state"].values())
    (record,) = numbers(config)
    assert record["skipped"] == ["koleo_loss"] and record["koleo_loss"] is None and record["loss"] is None


def test_training_goes_on_after_a_skipped_step(config: TrainConfig) -> None:
    model = build_model(config)
    break_at(model, {2, 3, 5})
    result = train(change(config, max_nonfinite=3), model=model)
    assert result.skipped_steps == 3
    assert [record["step"] for record in numbers(config) if "skipped" in record] == [2, 3, 5]
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_too_many_in_a_row_stop_and_name_the_term(config: TrainConfig) -> None:
    model = build_model(config)
    break_at(model, set(range(2, 100)))
    with pytest.raises(NonFiniteLossError, match=r"3 steps in a row were not finite, up to step 4: koleo_loss"):
        train(change(config, max_nonfinite=3), model=model)


def test_a_time_limit_ends_the_run_with_the_learning_rate_down(config: TrainConfig) -> None:
    result = train(change(config, steps=1_000_000, max_seconds=0.5))
    assert 0.5 <= result.seconds < 10
    assert 1 < result.step < 1_000_000
    assert result.history[-1]["lr"] < 0.2 * max(record["lr"] for record in result.history)


def test_accumulated_passes_average(config: TrainConfig, tmp_path: Path) -> None:
    """Without heads (whose assignments depend on the batch) two passes of 2 are one of 4."""
    plain = {"do_clustering": False, "do_masking": False, "do_cls": False}
    config = change(config, steps=3, model=plain)
    train(config)
    halves = change(config, out=str(tmp_path / "halves"), batch_size=2, accumulate=2)
    train(halves)
    # the same images in the same order: 4 is twice 2
    for a, b in zip(numbers(config)[:2], numbers(halves)[:2], strict=True):
        assert a["MSE"] == pytest.approx(b["MSE"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_start_from_weights(config: TrainConfig, tmp_path: Path) -> None:
    first = train(config)
    second = build_model(change(config, weights=str(first.checkpoint)))
    expected = first.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": ""}, "out is empty"),
        ({"data": ""}, "data is empty"),
        ({"preset": "b17"}, "b17"),
        ({"encoder": {"hiden_size": 4}}, "unknown encoder option 'hiden_size'; did you mean hidden_size"),
        ({"model": {"masks": 4}}, "unknown model option 'masks'; did you mean num_masks"),
        ({"batch_size": 64}, "10 images do not fill one batch: batch_size is 64"),
    ],
)
def test_a_run_that_cannot_start_says_why(config: TrainConfig, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(change(config, **changes))


def test_two_processes_train_one_model(config: TrainConfig, tmp_path: Path) -> None:
    config = change(config, steps=3, batch_size=2, model=TEACHER)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from stellar_fast.train import TrainConfig, train\n"
        "result = train(TrainConfig.load(sys.argv[1]))\n"
        "weights = torch.cat([tensor.flatten() for tensor in result.model.state_dict().values()])\n"
        "Path(f'{sys.argv[1]}.{os.environ[\"RANK\"]}').write_bytes(weights.numpy().tobytes())\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path / "config.yaml")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr and "Warning" not in done.stderr
    first, second = ((tmp_path / f"config.yaml.{rank}").read_bytes() for rank in range(2))
    assert len(first) > 100_000 and first == second
    assert [record["step"] for record in numbers(config)] == [1, 2, 3]


def test_a_signal_before_the_first_step_leaves_a_start(config: TrainConfig, tmp_path: Path) -> None:
    whole = train(config)
    other = change(config, out=str(tmp_path / "other"))

    class Signals(MultiViewDataset):
        def __getitem__(self, key: Key) -> dict:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(key)

    views = build_dataset(config, build_model(config))
    first = train(other, dataset=Signals(views.folder, views.transform, views.seed))
    assert (first.step, first.signal, first.checkpoint.name) == (0, signal.SIGTERM, "step_00000000")
    second = train(other, resume=True)
    assert second.step == 7 and numbers(other) == numbers(config)
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.model.state_dict().items())


class Fails(MultiViewDataset):
    """Views whose `at`-th batch of 4 raises an error, in whatever process reads it."""

    def __init__(self, config: TrainConfig, at: int, error: Exception) -> None:
        views = build_dataset(config, build_model(config))
        super().__init__(views.folder, views.transform, views.seed)
        self.count, self.at, self.error = 0, at, error

    def __getitem__(self, key: Key) -> dict:
        self.count += 1
        if self.count > 4 * (self.at - 1):
            raise self.error
        return super().__getitem__(key)


def fail_in_pass(model: StellarModel, at: int, error: Exception) -> None:
    """Raise in the loss of the `at`-th pass, once the forward has drawn its masks and moved the teacher."""
    whole, count = model.loss, iter(range(1, 1000))

    def loss(predictions: dict):
        if next(count) == at:
            raise error
        return whole(predictions)

    model.loss = loss


class FailsAt:
    """A logger that fails at a step, and at its end."""

    def __init__(self, step: int) -> None:
        self.step = step

    def log(self, record: dict) -> None:
        if record["step"] == self.step:
            raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("kind", "error", "told", "steps"),
    [
        ("data", TooManyUnreadable("9 of 10 images are unreadable"), "9 of 10 images are unreadable", 2),
        ("data", MemoryError(), "memory ran out: MemoryError", 2),
        ("pass", MemoryError("no room"), "memory ran out: no room", 1),
        ("pass", RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory ran out: DefaultCPU", 1),
        ("pass", RuntimeError("a bug"), None, 1),
        ("logger", None, r"\[Errno 28\] No space left on device", 3),
    ],
    ids=["images-gone", "memory-data", "memory", "memory-torch", "bug", "logger"],
)
def test_whatever_ends_a_run_the_steps_done_are_saved_and_go_on_bit_for_bit(
    config: TrainConfig, tmp_path: Path, kind: str, error: Exception, told: str | None, steps: int
) -> None:
    config = change(config, accumulate=2, model=TEACHER, steps=4)
    whole = train(config)
    other = change(config, out=str(tmp_path / "other"))
    torch.manual_seed(other.seed)
    model, dataset = build_model(other), None
    if kind == "data":
        dataset = Fails(other, 6, error)  # the second pass of the third step
    elif kind == "pass":
        fail_in_pass(model, 4, error)  # the second pass of the second step
    loggers = [FailsAt(2)] if kind == "logger" else []
    checkpoint = Path(other.out) / "checkpoints" / f"step_{steps:08d}"
    if told is None:
        with pytest.warns(UserWarning, match=f"^checkpoint {checkpoint}"), pytest.raises(RuntimeError) as bug:
            train(other, model=model)
        assert bug.value is error
    else:
        with pytest.raises(RunEndedError, match=f"^{told}.*; checkpoint {checkpoint}$") as caught:
            train(other, model=model, dataset=dataset, loggers=loggers)
        assert caught.value.checkpoint == checkpoint
    second = train(other, resume=True)
    assert second.step == 4 and numbers(other) == numbers(config)
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.model.state_dict().items())


def test_input_that_no_step_can_be_made_of_is_an_error_of_the_start(config: TrainConfig) -> None:
    with pytest.raises(TooManyUnreadable, match=r"^none is left$"):
        train(config, dataset=Fails(config, 1, TooManyUnreadable("none is left")))
    assert not list(Path(config.out, "checkpoints").iterdir())


def test_a_failed_save_ends_the_run_and_hides_no_other_error(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = change(config, save_every=2)
    whole, save = train(change(config, out=f"{config.out}-whole")), loop.save_checkpoint

    def full(root: Path, step: int, *arguments: Any) -> Path:
        if step > 2:
            raise OSError(f"cannot write {root}/step {step}: the disk is full, 5 MiB are needed, 1 MiB are free")
        return save(root, step, *arguments)

    monkeypatch.setattr(loop, "save_checkpoint", full)
    good = Path(config.out) / "checkpoints" / "step_00000002"
    with pytest.raises(RunEndedError, match=rf"^cannot write .*step 4: the disk is full, .* free; checkpoint {good}$"):
        train(config)
    with pytest.raises(RunEndedError, match=rf"^gone; cannot write .*step 3: the disk is full, .*; checkpoint {good}$"):
        train(config, resume=True, dataset=Fails(config, 2, TooManyUnreadable("gone")))
    monkeypatch.undo()
    expected = whole.model.state_dict()
    resumed = train(config, resume=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())
    assert [r["step"] for r in numbers(config)] == list(range(1, 8))


def test_a_lost_worker_ends_the_run_with_a_checkpoint(config: TrainConfig) -> None:
    class KillsWorker:
        def log(self, record: dict) -> None:
            if record["step"] == 2:
                for worker in multiprocessing.active_children():
                    worker.kill()

        def close(self) -> None:
            pass

    told = r"ended by SIGKILL, as the system does where memory runs out: use --workers 0; checkpoint .*/step_"
    with pytest.raises(RunEndedError, match=told) as e:
        train(change(config, workers=1, steps=1000), loggers=[KillsWorker()])
    assert e.value.checkpoint is not None and e.value.checkpoint.is_dir()
    assert multiprocessing.active_children() == []


def test_a_signal_does_not_wait_for_data(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker never answers again: neither the checkpoint nor the end wait for it."""

    class Sleeps(Fails):
        def __getitem__(self, key: Key) -> dict:
            try:
                return super().__getitem__(key)
            except TooManyUnreadable:
                threading.Event().wait()
                raise

    monkeypatch.setattr(loader.EndlessBatches.close, "__defaults__", (0.2,))
    threading.Timer(3.0, os.kill, [os.getpid(), signal.SIGTERM]).start()
    dataset = Sleeps(config, 3, TooManyUnreadable("asleep"))
    result = train(change(config, workers=1), dataset=dataset)
    assert (result.step, result.signal) == (2, signal.SIGTERM) and result.checkpoint.is_dir()
    assert multiprocessing.active_children() == []


def test_names_are_bytes(config: TrainConfig, photos: Path, tmp_path: Path) -> None:
    data, out = (tmp_path / os.fsdecode(name) for name in (b"photos\xe9\n", b"it's\xe9\nruns"))
    shutil.copytree(photos, data)
    for path in data.iterdir():
        path.rename(data / os.fsdecode(b"caf\xe9\n" + os.fsencode(path.name)))
    config = change(config, data=str(data), out=str(out), workers=2, tensorboard=True)
    first = train(config, loggers=[SignalAt(2, signal.SIGTERM)])
    assert first.resume_command is not None and first.resume_command.isprintable()
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {first.resume_command}"], capture_output=True).stdout
    assert [os.fsdecode(word) for word in words.split(b"\0")[:-1]] == [
        *("stellar-fast", "train", "--config", str(out / "config.yaml"), "--resume")
    ]
    assert TrainConfig.load(out / "config.yaml") == config
    second = train(TrainConfig.load(out / "config.yaml"), resume=True)
    assert second.step == 7 and [record["step"] for record in numbers(config)] == list(range(1, 8))
    meta = json.loads((second.checkpoint / "meta.json").read_text())
    assert os.fsencode(meta["run"]["config"]["data"]) == os.fsencode(data)
    names = sorted(b"caf\xe9\n%d.png" % i for i in range(10))
    assert meta["run"]["identity"]["image_names"] == hashlib.sha256(b"\n".join(names)).hexdigest()[:16]
    assert len(list((out / "tensorboard").iterdir())) == 2
    again = change(config, out=str(tmp_path / "again"), weights=str(out), steps=1)
    assert train(again).step == 1
    with pytest.raises(ValueError, match=r"it's\\xe9\\nruns already holds a run"):
        train(config)


def test_names_of_images_are_looked_at_once_a_run(config: TrainConfig, photos: Path) -> None:
    views, count = build_dataset(config, build_model(config)), 0

    class Folder:
        def __len__(self) -> int:
            return len(views.folder)

        def __getitem__(self, index: int) -> Any:
            return views.folder[index]

        @property
        def paths(self) -> list[Path]:
            nonlocal count
            count += 1
            return sorted(photos.iterdir())

    dataset = MultiViewDataset(Folder(), views.transform, views.seed)
    result = train(change(config, save_every=1, steps=3), dataset=dataset)
    assert count == 1
    names = "\n".join(f"{i}.png" for i in range(10))
    identity = json.loads((result.checkpoint / "meta.json").read_text())["run"]["identity"]
    assert identity["image_names"] == hashlib.sha256(names.encode()).hexdigest()[:16]  # as the previous release
    Folder.fingerprint = "0123456789abcdef"
    train(change(config, out=f"{config.out}2", steps=1), dataset=dataset)
    assert count == 1


class HostReads(TorchDispatchMode):
    """Lists the operators that hand a tensor's value to the host: on a GPU each of them waits for the device.

    It sees what Python dispatches. What runs inside of an operator it does not: our custom operators' own code, the
    `nonzero` of an index that is a mask, copies between a device and memory that is not pinned. For these there is
    `test_a_step_waits_for_nothing_on_a_gpu`.
    """

    OPERATORS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten._unique2.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.OPERATORS:
            self.found.append("".join(traceback.format_stack(limit=12)))
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for read in (torch.Tensor.item, bool, torch.nonzero, torch.unique):
        with HostReads() as reads:
            read(torch.ones(1))
        assert len(reads.found) == 1, read
    # on a CPU, and there alone, operators look at their inputs, and colours are changed in a list of selected images
    for op in ("packed_patch_embed", "prototype_cross_entropy", "token_attention"):
        door = importlib.import_module(f"stellar_fast.ops.{op}")  # the package's attribute is the function
        monkeypatch.setattr(door, "values_are_checked", lambda tensor: False)
    monkeypatch.setattr(importlib.import_module("stellar_fast.ops.sinkhorn"), "has_values", lambda tensor: False)
    config = change(config, accumulate=2, model=TEACHER | {"color_augmentation": False})
    model = build_model(config)
    trainer = _Trainer(config, model, build_dataset(config, model), torch.device("cpu"), Ranks())
    batches = trainer._batches()
    ready = [next(batches) for _ in range(4)]
    batches.close()
    with HostReads() as reads:
        readings = [trainer._train_step(iter(ready[:2])), trainer._train_step(iter(ready[2:]))]
    assert reads.found == []
    assert [reading.step for reading in readings] == [1, 2]
    assert readings[1].values()["loss"] > 0


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_waits_for_nothing_on_a_gpu(config: TrainConfig, precision: str) -> None:
    config = change(config, accumulate=2, model=TEACHER, device="cuda", precision=precision)
    model, device = build_model(config), torch.device("cuda")
    trainer = _Trainer(config, model, build_dataset(config, model), device, Ranks())
    batches = trainer._batches()
    ready = [next(batches) for _ in range(4)]
    batches.close()
    trainer._train_step(iter(ready[:2]))  # kernels are compiled and libraries loaded at their first use
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=device).item()
        reading = trainer._train_step(iter(ready[2:]))
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert reading.step == 2
    assert reading.values()["loss"] > 0
