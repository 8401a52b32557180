"""Which knobs a call takes, and the files they are kept in."""

import json
import re
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stellar_fast.kernels.common import threads as config
from stellar_fast.kernels.linear import config as linear
from stellar_fast.kernels.sinkhorn import config as sinkhorn
from stellar_fast.tune import lookup
from stellar_fast.tune.lookup import Problem, find, from_json, knobs
from stellar_fast.tune.store import FORMAT, Entry, Store, device_file, key

CPU, FP32, SHAPE = torch.device("cpu"), torch.float32, {"N": 32, "K": 16, "D": 768}


@pytest.fixture(autouse=True)
def four_threads(tmp_path, monkeypatch):
    """A cache of our own, and more threads than one to choose from."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("STELLAR_FAST_TUNE", "cache")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    lookup.forget()
    yield
    torch.set_num_threads(before)
    lookup.forget()


def problem(**sizes: int) -> Problem:
    return Problem("koleo", config, tuple((SHAPE | sizes).items()), FP32, CPU)


def entry(**changes: Any) -> Entry:
    state = {**lookup.state(CPU), "source": lookup.source_hash("koleo", "cpu")}
    new = Entry("koleo", "float32", SHAPE, request="float32 N=32", knobs={"forward": 2}, done=True, **state)
    return replace(new, **changes)


def user_store() -> Store:
    return lookup.user_store(lookup.device_name(CPU))


def keep(*entries: Entry) -> None:
    user_store().put(entries)
    lookup.forget()


def test_tuned_knobs_are_served_and_the_others_stay_the_heuristics():
    assert find(problem()) == (config.Config(4, 4), "heuristic")
    keep(entry())
    assert find(problem()) == (config.Config(2, 4), "user")
    assert find(problem(N=30)).source == "user", "of the same bucket"
    assert knobs("koleo", config, SHAPE, FP32, CPU) == config.Config(2, 4)
    assert lookup.threads("koleo", SHAPE, FP32).forward == 2
    assert lookup.threads("sinkhorn", SHAPE, FP32).forward == 4
    assert lookup.threads("koleo", SHAPE, torch.bfloat16).forward == 4


def test_off_serves_heuristics_alone(monkeypatch):
    keep(entry())
    monkeypatch.setenv("STELLAR_FAST_TUNE", "off")
    assert knobs("koleo", config, SHAPE, FP32, CPU) == config.Config(4, 4)
    monkeypatch.setenv("STELLAR_FAST_TUNE", "on")
    with pytest.raises(ValueError, match="STELLAR_FAST_TUNE must be 'cache' or 'off' but is 'on'"):
        knobs("koleo", config, SHAPE, FP32, CPU)


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "another kernel"},
        {"software": "torch 1.0"},
        {"threads": 8},
        {"dtype": "bfloat16"},
        {"knobs": {"forward": 5}},  # more than torch may use
        {"knobs": {"forward": "2"}},
        {"knobs": {"num_warps": 2}},
        {"knobs": None, "heuristic_ms": 1.0},
    ],
)
def test_knobs_that_do_not_fit_are_not_taken(changes):
    keep(entry(**changes))
    assert find(problem()) == (config.Config(4, 4), "heuristic")


def test_the_nearest_shape_serves_up_to_a_distance():
    keep(entry(), entry(shape=SHAPE | {"N": 256}, knobs={"forward": 3}))
    assert find(problem(N=64)) == (config.Config(2, 4), "nearest")
    assert find(problem(N=128)) == (config.Config(3, 4), "nearest")
    assert find(problem(N=256, K=32)) == (config.Config(3, 4), "nearest")
    assert find(problem(N=16, K=4)).source == "heuristic", "eight times smaller"
    assert find(problem(V=1)).source == "heuristic", "other letters"
    assert lookup.distance({"N": 8, "K": 4}, {"N": 4, "K": 16}) == 3


def test_what_is_not_measured_yet_hides_nothing(monkeypatch, tmp_path):
    (tmp_path / "koleo").mkdir()
    monkeypatch.setattr(lookup, "committed_store", lambda op, device: Store(tmp_path / "koleo.json", device, False))
    lookup.committed_store("koleo", lookup.device_name(CPU)).put([entry()])
    user_store().put([entry(knobs={}, done=False)])
    assert lookup.find(problem()).source == "committed"
    user_store().put([entry(knobs={}, heuristic_ms=1.0)])
    lookup.forget()
    assert lookup.find(problem()).source == "user"


def test_the_users_knobs_come_before_committed_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(lookup, "room", lambda op, room=lookup.room: tmp_path / op if op == "koleo" else room(op))
    lookup.source_hash.cache_clear()
    try:
        place = lookup.committed_store("koleo", lookup.device_name(CPU))
        assert place.path.parent == tmp_path / "koleo" / "configs"
        place.put([entry(knobs={"backward": 1})])
        lookup.forget()
        assert find(problem()) == (config.Config(4, 1), "committed")
        keep(entry())
        assert find(problem()) == (config.Config(2, 4), "user")
        place.path.write_text("{")
        lookup.forget()
        with pytest.warns(UserWarning, match="and is ignored; heuristics serve until `stellar-fast tune` has run"):
            find(problem(N=64))
        assert place.path.exists(), "not ours to move"
    finally:
        lookup.source_hash.cache_clear()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"format"', "Expecting ':' delimiter"),
        ("[1, 2]", f"its format is not '{FORMAT}'"),
        (json.dumps({"format": FORMAT, "device": "another", "entries": []}), "its device is 'another', not"),
        (json.dumps({"format": FORMAT, "device": "DEVICE", "entries": [{"op": "koleo"}]}), "an entry does not fit"),
        (b"\xff\x00", "can't decode"),
    ],
    ids=["cut off", "no store", "another device", "no entry", "no text"],
)
def test_a_file_that_cannot_be_read_is_set_aside(content, reason):
    store = user_store()
    store.path.parent.mkdir(parents=True)
    data = content if isinstance(content, bytes) else content.replace("DEVICE", store.device).encode()
    store.path.write_bytes(data)
    with pytest.warns(UserWarning) as told:
        assert find(problem()).source == "heuristic"
    assert (
        len(told) == 1 and reason in str(told[0].message) and f"aside as {store.path.name}.bad" in str(told[0].message)
    )
    assert not store.path.exists() and store.path.with_name(store.path.name + ".bad").read_bytes() == data
    keep(entry())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find(problem()).source == "user", "and a new one is written"


def test_two_processes_at_once_keep_both_results(tmp_path):
    code = """
import sys
from dataclasses import asdict, replace
from pathlib import Path
from stellar_fast.tune.store import Entry, Store
store = Store(Path(sys.argv[1]), "here")
for i in range(20):
    store.put([Entry(sys.argv[2], "float32", {"N": 2**i}, 1, "torch", "abc", "")])
"""
    file = tmp_path / "folder" / "here.json"
    running = [subprocess.Popen([sys.executable, "-c", code, str(file), op]) for op in ("koleo", "sinkhorn")]
    assert [process.wait() for process in running] == [0, 0]
    found = Store(file, "here").read()
    assert len(found) == 40 and [path.name for path in file.parent.iterdir()] == ["here.json"], (
        "and no file is left over"
    )
    assert Store(file, "here").remove(["koleo"]) == 20 and len(Store(file, "here").read()) == 20
    assert Store(file, "here").remove() == 20 and Store(file, "here").read() == {}


def test_a_gpu_without_tuned_knobs_is_told_once(monkeypatch):
    monkeypatch.setattr(lookup, "device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(lookup, "_warned", False)
    on_gpu = problem()._replace(device=torch.device("cuda"))
    with pytest.warns(UserWarning, match=r"no tuned launch knobs for NVIDIA H100: .*`stellar-fast tune --device cuda`"):
        assert find(on_gpu).source == "heuristic"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find(on_gpu)


def test_forced_knobs_come_first_and_questions_are_seen():
    keep(entry())
    with lookup.observe() as asked, lookup.force(problem(), config.Config(1, 1)):
        assert lookup.threads("koleo", SHAPE, FP32) == config.Config(1, 1)
        assert lookup.threads("koleo", SHAPE | {"N": 8}, FP32) != config.Config(1, 1)
    assert asked == {problem(), problem(N=8)}
    assert lookup.threads("koleo", SHAPE, FP32) == config.Config(2, 4)


def test_configs_survive_json():
    shape = {"T": 70, "I": 130, "O": 190}
    for found in linear.candidates(shape, FP32):
        assert from_json(linear.Config, json.loads(json.dumps(asdict(found)))) == found
    for C in (16384, 131072):  # rows that a program holds, and not
        found = sinkhorn.heuristic({"R": 1024, "C": C}, FP32, "sm_90")
        assert from_json(sinkhorn.Config, json.loads(json.dumps(asdict(found)))) == found
    for wrong in ({"forward": 1}, {"forward": 1, "backward": True}, [1, 2]):
        with pytest.raises(ValueError, match="is no"):
            from_json(config.Config, wrong)


def test_buckets():
    def bucket(size: int) -> str:
        return key("koleo", "float32", {"N": size}, 0, "triton 3").split()[2].removeprefix("N=")

    assert [bucket(n) for n in (0, 1, 2, 3, 5, 7, 9, 196, 768, 2170, 16384)] == (
        ["0", "1", "2", "3", "6", "8", "8", "192", "768", "2048", "16384"]
    )


def test_the_hash_follows_the_kernels_sources(monkeypatch, tmp_path):
    room, common = tmp_path / "koleo", tmp_path / "common"
    for folder in (room, common):
        folder.mkdir()
        (folder / "kernel.py").write_text("a")
    (room / "reference.py").write_text("a")
    monkeypatch.setattr(lookup, "room", lambda op: room)
    found = []
    for path in (None, room / "reference.py", room / "kernel.py", common / "kernel.py"):
        if path is not None:
            Path(path).write_text("b")
        found.append(lookup.source_hash.__wrapped__("koleo", "cpu"))
    monkeypatch.setattr(lookup.native, "source_hash", lambda op: "another build")
    found.append(lookup.source_hash.__wrapped__("koleo", "cpu"))
    assert found[0] == found[1] and len(set(found)) == 4, "all but the reference"
    found = [lookup.source_hash.__wrapped__(op, device) for op in ("koleo", "linear") for device in ("cpu", "cuda")]
    assert len(set(found)) == 4, "each with its door, and on a GPU without the C++"


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3.json"),
        ("Intel(R) Xeon(R) Processor family 6 model 167", "intel-r-xeon-r-processor-family-6-model-167.json"),
        ("a" * 160, "a" * 160 + ".json"),
    ],
)
def test_files_of_ascii_names_keep_theirs(device, name):
    assert device_file(device) == name


def test_every_device_has_a_file_of_its_own(tmp_path):
    """Names that differ in what a file name cannot hold, or after more than it can; and names without a letter."""
    devices = ["Größe 1", "Grösse 1", "Gräße 1", "Gr e 1", "龍芯", "海光", "®", "", "\udcff", "a\u0131", "ai"]
    devices += [f"{'x' * n}{end}" for n in (160, 300) for end in "ab"] + [f"{'é' * 300}{end}" for end in "ab"]
    names = [device_file(device) for device in devices]
    assert len(set(names)) == len(devices)
    for device, name in zip(devices, names, strict=True):
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]*\.json", name) and len(name) < 200
        store = Store(tmp_path / name, device)
        store.put([entry()])
        assert len(Store(tmp_path / name, device).read()) == 1
    assert len(list(tmp_path.iterdir())) == len(devices)


def test_a_processor_whose_name_is_no_utf8_has_one(monkeypatch):
    cpuinfo = b"cpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Gr\xf6\xdfe\n"
    monkeypatch.setattr(Path, "read_text", lambda path, *decoding: cpuinfo.decode(*decoding))
    assert lookup.device_name.__wrapped__(CPU) == "Gr\ufffd\ufffde family 6 model 85"
