"""Result files, pictures and README's numbers, from rows that are made up."""

import csv
import dataclasses
import json
import math

import pytest
from PIL import Image

from benchmarks import plots, readme, results
from benchmarks.model import scaling
from benchmarks.results import COLUMNS, NOTHING, Row


def row(**changes) -> Row:
    text = {field.name: "x" for field in dataclasses.fields(Row) if field.type is str}
    numbers = {field.name: field.type(1) for field in dataclasses.fields(Row) if field.type is not str}
    return Row(**text | numbers | changes)


def test_every_column_is_explained() -> None:
    assert list(COLUMNS) == [field.name for field in dataclasses.fields(Row)]


def test_rows_come_back_from_csv_and_json(tmp_path) -> None:
    facts = {"device_name": "AMD EPYC (2 cores)", "torch": "2.13.0+cpu", "date": "2031-01-02T03:04:05Z"}
    path = results.result_path(tmp_path / "results", facts)
    assert path.name == "amd-epyc-2-cores-torch2.13.0-2031-01-02.csv"

    first = row(provider="plain", shape="B=2, 224", median_ms=1234.5678, mfu=NOTHING)
    results.append_rows(path, [first])
    beside = results.append_rows(path, [row(provider="ours", flops=3e12)])
    assert sorted(path.parent.iterdir()) == [path, beside]
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    for rows in (results.read_rows(path), results.read_rows([beside])):
        assert [found.provider for found in rows] == ["plain", "ours"]
        assert rows[0].shape == "B=2, 224" and rows[0].median_ms == 1234.57 and math.isnan(rows[0].mfu)
        assert rows[1] == row(provider="ours", flops=3e12)
    content = json.loads(beside.read_text())
    assert content["columns"] == COLUMNS and content["rows"][0]["mfu"] is None


def test_any_name_of_a_device_serves(tmp_path) -> None:
    name = 'Процессор 龍芯, "Größe"\u2028\x85 ' + "é" * 60
    facts = {"torch": "2.13.0+cpu", "date": "2031-01-02T03:04:05Z"}
    path, other = (results.result_path(tmp_path, facts | {"device_name": text}) for text in (name, name + "e"))
    assert path != other and path.name.isascii() and path.name.endswith("-torch2.13.0-2031-01-02.csv")
    for _ in range(2):
        beside = results.append_rows(path, [row(device_name=name)])
    for rows in (results.read_rows(path), results.read_rows(beside)):
        assert [found.device_name for found in rows] == [name, name]
    measured = [dataclasses.replace(found, device_name=name) for found in synthetic()]
    assert f"\n{name}, torch " in readme.numbers(measured)
    legible = [dataclasses.replace(found, device_name="Процессор " + "é" * 70) for found in measured]
    assert plots.draw(legible, legible, tmp_path)


def test_an_old_file_gets_the_new_columns_and_keeps_its_own(tmp_path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("date,provider,median_ms,peak_extra_mib\n2030-01-01,plain,7.00,nan\n")
    results.append_rows(path, [row(provider="ours")])
    lines = list(csv.DictReader(path.read_text().splitlines()))
    assert [(line["provider"], line["op"], line["median_ms"]) for line in lines] == [
        ("plain", "", "7.00"),
        ("ours", "x", "1"),
    ]
    old = results.read_rows(path)[0]
    assert (old.op, old.batch, old.median_ms) == ("", 0, 7.0) and math.isnan(old.mfu) and math.isnan(old.peak_extra_mib)


def test_a_file_with_unknown_columns_is_left_alone(tmp_path) -> None:
    path = tmp_path / "foreign.csv"
    path.write_text("old,columns\n1,2\n")
    with pytest.raises(ValueError, match="old,columns"):
        results.append_rows(path, [row()])
    assert path.read_text() == "old,columns\n1,2\n"


def synthetic() -> list[Row]:
    """Two commits of one model and one operator, and a series of scaling with exponent 1."""
    rows = []
    for date, commit, ms in (("2031-01-01", "aaa", 50.0), ("2031-01-02", "bbb", 25.0)):
        run = {"date": date, "commit": commit, "allocator": "default", "dtype": "fp32", "torch": "2.13.0+cpu"}
        for provider, time_ms in (("plain", 100.0), ("stellar_fast", ms)):
            speed = {"ratio": 100 / time_ms, "ratio_p20": 90 / time_ms, "ratio_p80": 110 / time_ms}
            case = run | speed | {"median_ms": time_ms, "preset": "b16", "provider": provider}
            peak = {"mfu": 0.4, "best_gemm_gflop_per_s": 400.0, "peak_extra_mib": 1000 / time_ms}
            rows.append(row(**case | peak, suite="encode", op="", batch=8))
            case["provider"] = provider.replace("fast", "fast.cpu")
            rows.append(row(**case, suite="ops", op="koleo", shape="N=1", direction="forward", flops=2e9))
    for batch in (1, 2, 4):
        case = {"direction": "encode, batch", "op": "", "provider": "stellar_fast", "dtype": "fp32", "ratio": NOTHING}
        rows.append(row(**case, suite="scaling", batch=batch, median_ms=3.0 * batch))
    return rows


def test_every_picture_is_drawn(tmp_path) -> None:
    rows = synthetic()
    paths = plots.draw(rows, rows, tmp_path)
    assert [path.name for path in paths] == ["speedups.png", "roofline.png", "scaling.png", "throughput.png"]
    for path in paths:
        with Image.open(path) as picture:
            extremes = picture.convert("L").getextrema()
            assert picture.format == "PNG" and min(picture.size) > 100 and extremes[1] - extremes[0] > 100
    of_models = [found for found in rows if found.suite == "encode"]
    assert [path.name for path in plots.draw(of_models, [], tmp_path)] == ["speedups.png"]


def test_exponents_are_those_of_the_series() -> None:
    assert scaling.exponents(synthetic()) == {("encode, batch", "fp32"): pytest.approx(1.0)}
    shaped = row(suite="scaling", direction="objective, prototypes", shape="B=4 224px/16 K=16 C=65536 pixel head")
    assert scaling.grown(shaped) == 65536
    assert scaling.grown(dataclasses.replace(shaped, direction="encode, sparse tokens")) == 16
    assert scaling.grown(dataclasses.replace(shaped, direction="step, threads", threads=2)) == 2


def test_readme_takes_the_newest_run_that_has_both_sides() -> None:
    rows = synthetic()
    lone = dataclasses.replace(rows[2], date="2031-01-03", median_ms=1.0)  # plain alone
    text = readme.rewritten(f"head\n{readme.BEGIN}stale\n{readme.END}\ntail\n", [*rows, lone])
    assert text.startswith("head\n") and text.endswith(f"{readme.END}\ntail\n") and "stale" not in text
    assert (
        "| encode B=8, fp32 | 100 ms | 25.0 ms | **4.00x** (3.60 to 4.40) | 40% of 400 GFLOP/s | 10, 40 MiB |" in text
    )
    assert "| `koleo` | b16: N=1 | 4.0 |  |  |  |" in text
    raised = [dataclasses.replace(found, date="2031-01-04", allocator="raised", ratio=9.9) for found in rows]
    assert readme.numbers([*rows, *raised]) == readme.numbers(rows)
    with pytest.raises(ValueError, match="must have the lines"):
        readme.rewritten("no markers", rows)


def test_readme_says_what_was_measured() -> None:
    text = readme.README.read_text()
    assert text == readme.rewritten(text, results.read_rows(readme.committed())), "run `make readme-numbers`"
