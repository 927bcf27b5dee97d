"""Records: what is saved comes back exactly, whatever is done to the process that saves."""

import json
import math
import multiprocessing
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orograph.durable import sealed_line
from orograph.encoding import decode, encode
from orograph.errors import OrographWarning, RecordError
from orograph.records import Record, Records, load_records, save_records
from orograph.results import Curve, Density, Eigenpairs, Estimate, Point, Spectrum, Surface, Table
from orograph.scalars import scalars

STORED = Path(__file__).parent / "data" / "schema-1"


def make_eigenpairs(values: list[float], size: int = 7) -> Eigenpairs:
    found = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    return Eigenpairs(
        values=found, vectors=torch.randn(size, len(values), generator=generator), residuals=found.abs() * 1e-4,
        converged=torch.tensor([True] * (len(values) - 1) + [False]), intervals=torch.stack([found - 0.5, found + 0.5], dim=1),
        missed=0.01, products=40, status="budget-limited",
    )


def make_density() -> Density:
    nodes = torch.tensor([[-1.0, 0.0, 1.0], [-0.5, 0.25, 2.0]], dtype=torch.float64)
    return Density(nodes=nodes, weights=torch.full_like(nodes, 0.3), atoms=torch.tensor([9.0], dtype=torch.float64), size=10, width=0.1)


def make_spectrum() -> Spectrum:
    return Spectrum(
        top=make_eigenpairs([9.0, 4.0]), bottom=make_eigenpairs([-1.0]), trace=Estimate(value=20.0, sem=1.0, dof=9.0),
        density=make_density(), negative_mass=Estimate(value=0.25, sem=0.05), condition={"absolute": 9.0, "plain": math.inf},
        products=120, status="budget-limited", unit="loss",
    )


ALL_KINDS = {
    "estimate": Estimate(value=1.5, sem=0.5, dof=math.inf, skew=-0.25, products=3, status="noise-limited", label="norm", unit="loss"),
    "undefined": Estimate(value=math.nan, sem=math.inf),
    "diagonal": Estimate(value=torch.tensor([1.0, math.inf, math.nan, -0.0]), sem=torch.zeros(4)),
    "eigenpairs": make_eigenpairs([3.0, 2.0, 1.0]),
    "no_pairs": make_eigenpairs([2.0], size=0),
    "density": make_density(),
    "spectrum": make_spectrum(),
    "curve": Curve(x=torch.arange(3.0), y=torch.tensor([1.0, math.nan, -math.inf]), error=None, xlabel="t"),
    "surface": Surface(x=torch.arange(2.0), y=torch.arange(3.0), z=torch.arange(6.0).reshape(3, 2).T, error=torch.ones(2, 3), evaluations=6),
    "table": Table(rows=[{"name": "a", "value": math.inf, "vacuous": True, "n": 2**60}, {"name": "b", "value": None}], x="name", y="value"),
    "point": Point(
        theta=torch.randn(5, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16),
        buffers={"bn.count": torch.tensor(7), "bn.mean": torch.zeros(0, 3)}, frozen={"$odd name": torch.tensor([True, False])}, label="end",
    ),
}


def same(a: object, b: object) -> bool:
    """Equality to the last bit and the type; nan equals nan."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
    if is_dataclass(a) and not isinstance(a, type):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex()
    return type(a) is type(b) and a == b


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("name", ALL_KINDS)
def test_every_kind_comes_back_exactly(tmp_path, name):
    record = Record(probe="test", results={name: ALL_KINDS[name]}, tags={"step": 3, "rate": math.inf}, settings={"sigmas": [0.1, math.nan]})
    save_records(record, tmp_path, vectors=True)
    (loaded,) = load_records(tmp_path)
    assert same(record, loaded)


def test_eigenvectors_are_stored_only_on_request(tmp_path):
    save_records(Record(probe="spectrum", results={"spectrum": make_spectrum(), "pairs": make_eigenpairs([1.0])}), tmp_path)
    (loaded,) = load_records(tmp_path)
    assert loaded["spectrum"].top.vectors is None and loaded["spectrum"].bottom.vectors is None and loaded["pairs"].vectors is None
    assert same(loaded["spectrum"].top.values, make_spectrum().top.values)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
nested = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3))


@settings(max_examples=40, deadline=None)
@given(nested | st.dictionaries(st.sampled_from(["$float", "$tensor", "$kind", "$map", "a"]), nested))
def test_settings_come_back_exactly(value):
    tensors: dict[str, Tensor] = {}
    assert same(_canonical(decode(encode(value, tensors), tensors)), _canonical(value)) and not tensors


def _canonical(value):
    """Different nans are one value to JSON."""
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    return math.nan if isinstance(value, float) and math.isnan(value) else value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_tensors_of_every_type_and_shape_come_back_exactly(tmp_path, dtype, shape):
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 5).to(dtype)
    save_records(Record(probe="test", results={"x": Estimate(value=tensor, sem=tensor.clone())}), tmp_path)
    assert same(load_records(tmp_path)[0]["x"].value, tensor)


def test_views_of_one_tensor_are_stored_apart(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    save_records(Record(probe="test", results={"a": Curve(x=whole[0, :2], y=whole[:, 1].requires_grad_()), "b": Estimate(value=whole.T), "c": Estimate(value=whole)}), tmp_path)
    loaded = load_records(tmp_path)[0]
    assert same(loaded["a"].y, torch.tensor([1.0, 4.0])) and same(loaded["b"].value, whole.T.contiguous())


def test_what_no_record_can_hold_is_named():
    with pytest.raises(TypeError, match=r"results\.layers\.rows\.0\.trace is a complex, which a record cannot hold"):
        encode({"layers": Table(rows=[{"trace": 1j}])}, {}, where="results")


def test_saving_appends_in_order(tmp_path):
    save_records([Record(probe="a", results={}), Record(probe="b", results={})], tmp_path / "new" / "folder")
    save_records(Record(probe="c", results={}), tmp_path / "new" / "folder")
    loaded = load_records(tmp_path / "new" / "folder")
    assert [record.probe for record in loaded] == ["a", "b", "c"]
    assert isinstance(loaded[1:], Records) and len(loaded[1:]) == 2 and loaded[-1].probe == "c"


def test_unfinished_line_is_skipped_and_harms_no_later_one(tmp_path):
    save_records([Record(probe="a", results={}), Record(probe="b", results={})], tmp_path)
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.warns(OrographWarning, match=r"records\.jsonl, line 2 is unfinished"):
        assert [record.probe for record in load_records(tmp_path)] == ["a"]
    save_records(Record(probe="c", results={}), tmp_path)
    with pytest.warns(OrographWarning, match="line 2 is unfinished"):
        assert [record.probe for record in load_records(tmp_path)] == ["a", "c"]


def test_line_that_lacks_only_its_end_is_kept(tmp_path):
    save_records(Record(probe="a", results={}), tmp_path)
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert len(load_records(tmp_path)) == 1
    save_records(Record(probe="b", results={}), tmp_path)
    assert [record.probe for record in load_records(tmp_path)] == ["a", "b"]


def test_damage_elsewhere_names_file_and_line(tmp_path):
    save_records([Record(probe="a", results={}), Record(probe="b", results={})], tmp_path)
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"{" + path.read_bytes())
    with pytest.warns(OrographWarning, match=r"records\.jsonl, line 1 is damaged .*Restore the file, or remove that line.* It is left out"):
        assert [record.probe for record in load_records(tmp_path)] == ["b"]


def test_missing_or_damaged_arrays_are_named(tmp_path):
    save_records(Record(probe="a", results={"curve": ALL_KINDS["curve"]}), tmp_path)
    (arrays,) = (tmp_path / "arrays").iterdir()
    arrays.write_bytes(arrays.read_bytes()[:-1])
    with pytest.raises(RecordError, match=rf"line 1 needs .*{arrays.name}, which cannot be read"):
        load_records(tmp_path)
    arrays.unlink()
    with pytest.raises(RecordError, match=rf"line 1 needs .*{arrays.name}, which cannot be read"):
        load_records(tmp_path)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"schema": 3, "probe": "a"}', "schema 3, .*reads schema 1 and 2. A newer version wrote it: pip install --upgrade orograph"),
        ('{"probe": "a"}', "schema None, .*It is no record: remove that line"),
        ("[1]", "schema None, .*It is no record: remove that line"),
        ('{"schema": 1, "probe": "a"}', "line 1 is damaged: .*results"),
        ('{"schema": 1, "probe": "a", "results": {"r": {"$kind": "Volume"}}}', "no result kind 'Volume'; known are Estimate"),
        ('{"schema": 1, "probe": "a", "results": {"r": {"$kind": "Curve"}}}', "stored Curve does not fit its class"),
        ('{"schema": 1, "probe": "a", "results": {"r": {"$tensor": "x"}}}', "tensor 'x' is not among the stored arrays"),
    ],
)
def test_unreadable_lines_say_what_to_do(tmp_path, line, match):
    (tmp_path / "records.jsonl").write_text(line + "\n")
    with pytest.raises(RecordError, match=match):
        load_records(tmp_path)


def test_missing_folder_is_told_from_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
        load_records(tmp_path / "nowhere")
    with pytest.raises(RecordError, match=r"holds no records\.jsonl"):
        load_records(tmp_path)


def _append(folder: str, writer: int, count: int) -> None:
    for i in range(count):
        save_records(Record(probe="p", results={"x": Curve(x=torch.tensor([writer, i]), y=torch.zeros(2))}, says="x" * 5000), folder)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_processes_share_a_folder(tmp_path):
    processes = [multiprocessing.get_context("fork").Process(target=_append, args=(str(tmp_path), writer, 15)) for writer in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    found = [tuple(record["x"].x.tolist()) for record in load_records(tmp_path)]
    assert sorted(found) == [(writer, i) for writer in range(2) for i in range(15)]
    assert [i for writer, i in found if writer == 0] == list(range(15))  # each process's own order is kept


@pytest.mark.filterwarnings("ignore::orograph.errors.OrographWarning")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_process_leaves_a_folder_that_loads_and_grows(tmp_path):
    path = tmp_path / "records.jsonl"
    for kill in range(5):
        before = path.stat().st_size if kill else 0
        process = multiprocessing.get_context("fork").Process(target=_append, args=(str(tmp_path), kill, 10**9))
        process.start()
        deadline = time.monotonic() + 30
        while (not path.exists() or path.stat().st_size < before + 20_000) and time.monotonic() < deadline:
            time.sleep(0.001 * (kill + 1))
        process.kill()
        process.join()
        count = len(load_records(tmp_path))
        save_records(Record(probe="after", results=ALL_KINDS), tmp_path)
        loaded = load_records(tmp_path)
        assert count >= 3 * (kill + 1) and len(loaded) == count + 1 and loaded[-1].probe == "after"


def test_missing_result_is_named_with_the_reason():
    record = Record(probe="noise", results={"loss": ALL_KINDS["curve"]}, missing={"accuracy": "the task is a regression"})
    assert record["loss"] is ALL_KINDS["curve"]
    with pytest.raises(KeyError, match=r"no result 'accuracy'. It is missing because the task is a regression. It has: loss"):
        record["accuracy"]


def test_print_shows_each_number_with_its_interval():
    record = Record(
        probe="spectrum", results={"spectrum": make_spectrum(), "norm": Estimate(value=1.5)}, says="Sharp in two directions.", label="mlp",
        status="budget-limited", products=120, reused=40, seconds=1.25, missing={"accuracy": "no classes"},
    )
    text = str(record)
    for part in ["spectrum of mlp  (budget-limited)", "Sharp in two directions.", "top.eigenvalue[0]", "9.00 [8.50, 9.50]", "trace",
                 "20.0 [17.7, 22.3]", "norm  1.5", "accuracy is missing: no classes", "120 products and 40 reused, 1.25 s"]:
        assert part in text
    assert repr(record) == "<Record spectrum of 'mlp': spectrum, norm; budget-limited, 120 products>"
    assert repr(Records([record])) == "<Records: spectrum; 1 in all>" and str(Records([record])) == text


@pytest.mark.parametrize("name", ALL_KINDS)
def test_every_kind_prints_and_has_numbers(name):
    assert name in str(Record(probe="p", results={name: ALL_KINDS[name]})) and scalars(ALL_KINDS[name])


def test_frame_has_one_row_for_each_number():
    rows = [{"name": "a", "value": 2.0, "error": 0.5}, {"name": "b", "trace": 1.0, "trace_sem": 0.1, "vacuous": True}]
    records = Records([
        Record(probe="gradient", label="mlp", results={"norm": Estimate(value=2.0, sem=1.0)}, tags={"step": 5}, products=3),
        Record(probe="layers", label="mlp", results={"layers": Table(rows=rows)}, status="noise-limited"),
    ])
    frame = records.to_frame()
    assert list(frame.columns) == ["probe", "label", "result", "quantity", "value", "lower", "upper", "status", "products", "step"]
    assert frame["quantity"].tolist() == ["value", "a.value", "b.trace"] and frame["value"].tolist() == [2.0, 2.0, 1.0]
    assert frame["upper"].tolist() == pytest.approx([3.96, 2.98, 1.196], abs=1e-3)
    assert frame["status"].tolist() == ["converged", "noise-limited", "noise-limited"] and frame["step"].tolist()[0] == 5
    assert Records().to_frame().empty


def test_frame_without_pandas_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'orograph\[frames\]'"):
        Records().to_frame()


def test_stored_example_of_schema_1_loads():
    """Written by the first version; must never be written again."""
    gradient, spectrum, everything = load_records(STORED)
    assert gradient["norm"].value == 0.125 and gradient.tags == {"seed": 1} and gradient.created == "2026-11-24T00:00:00+00:00"
    assert spectrum["spectrum"].top.values.tolist() == [9.0, 4.0] and spectrum["spectrum"].top.vectors is None
    assert spectrum["spectrum"].condition == {"absolute": 9.0, "plain": math.inf} and spectrum.missing == {"accuracy": "the task is a regression"}
    assert list(everything.results) == list(ALL_KINDS)
    assert all(same(everything[name], ALL_KINDS[name]) for name in ALL_KINDS if name not in ("eigenpairs", "no_pairs", "spectrum"))


# -- one damaged record costs the others nothing -----------------------------------------------------------------------------------


def three_records(folder):
    save_records([Record(probe=name, results={"curve": ALL_KINDS["curve"]}) for name in "abc"], folder)
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def rewritten(folder, lines):
    """Lines with checksums of their own: what a program that knows the format would write."""
    (folder / "records.jsonl").write_bytes(b"".join(sealed_line({key: value for key, value in line.items() if key != "sha256"}) + b"\n" for line in lines))


def test_missing_arrays_spoil_one_record(tmp_path):
    lines = three_records(tmp_path)
    (tmp_path / "arrays" / f"{lines[1]['arrays']}.safetensors").unlink()
    with pytest.warns(OrographWarning, match=r"line 2 needs .*which cannot be read.*It is left out"):
        assert [record.probe for record in load_records(tmp_path)] == ["a", "c"]


def test_swapped_arrays_are_noticed(tmp_path):
    first, second, _ = (tmp_path / "arrays" / f"{line['arrays']}.safetensors" for line in three_records(tmp_path))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.warns(OrographWarning, match="needs .*it belongs to") as found:
        assert [record.probe for record in load_records(tmp_path)] == ["c"]
    assert len(found) == 2


@pytest.mark.parametrize("name", ["../x", "../../etc/passwd", "/etc/passwd", "A" * 32, "0" * 31, "0" * 33, "g" * 32, "", 7, ["0" * 32], True])
def test_array_ids_are_32_hexadecimal_digits(tmp_path, name):
    lines = three_records(tmp_path)
    lines[1]["arrays"] = name
    rewritten(tmp_path, lines)
    with pytest.warns(OrographWarning, match="line 2 is damaged: arrays is .*not 32 hexadecimal digits"):
        assert [record.probe for record in load_records(tmp_path)] == ["a", "c"]


FIELDS = {  # field -> (values of a wrong type)
    "probe": [1, None, ["a"]], "results": [[], "x", {"curve": 1.5}, {"curve": {"$kind": "Estimate", "value": "1.5"}}], "says": [None, 3], "missing": [["a"], {"a": 1}],
    "settings": [None, [1]], "tags": [{"a": [1]}, "x"], "provenance": [3], "products": ["3", 1.5, True, None], "reused": ["0"], "seconds": ["1", None, True],
    "status": ["good", 1, None], "label": [5], "created": [0],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values], ids=repr)
def test_a_field_of_another_type_is_named_with_file_and_line(tmp_path, field, value):
    lines = three_records(tmp_path)
    lines[1][field] = value
    rewritten(tmp_path, lines)
    with pytest.warns(OrographWarning, match=rf"records\.jsonl, line 2 is damaged: .*{field}.*It is left out"):
        assert [record.probe for record in load_records(tmp_path)] == ["a", "c"]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_field_of_a_result_of_another_type_is_named(tmp_path, kind):
    save_records([Record(probe="a", results={}), Record(probe="b", results={"r": ALL_KINDS[kind]})], tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    for field in fields(ALL_KINDS[kind]):
        wrong = json.loads(json.dumps(lines))
        wrong[1]["results"]["r"][field.name] = {"$map": [[1, 2]]}
        rewritten(tmp_path, wrong)
        with pytest.warns(OrographWarning, match=rf"line 2 is damaged: .*{field.name}"):
            assert [record.probe for record in load_records(tmp_path)] == ["a"]
