"""Files and folders written whole, locks and leftovers, checksums, digests, results of any age."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from immunize_ext import storage
from immunize_ext.storage import (
    check_sealed,
    digest,
    load_checkpoint,
    migrate,
    new_folder,
    read_results,
    run_directory,
    save_checkpoint,
    seal_folder,
    write_file,
)

pytest.importorskip("safetensors")


@pytest.fixture(params=["exchange", "two renames"])
def any_file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems that let two names change places in one step, and others."""
    if request.param == "two renames":
        monkeypatch.setattr(storage, "_exchange", lambda first, second: False)


def fill(target: Path, text: str, *, force: bool = True) -> None:
    with run_directory(target, force=force) as writing:
        (writing / "results.json").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- files and folders ----------------------------------------------------------------------------


@pytest.mark.usefixtures("any_file_system")
def test_a_run_is_replaced_whole(tmp_path: Path) -> None:
    fill(tmp_path / "run", "old")
    fill(tmp_path / "run", "new")
    assert (tmp_path / "run" / "results.json").read_text() == "new"
    assert names(tmp_path) == ["run"]


@pytest.mark.usefixtures("any_file_system")
@pytest.mark.parametrize("before", [False, True])
def test_a_run_that_appears_meanwhile_is_not_replaced(before: bool, tmp_path: Path) -> None:
    target = tmp_path / "run"
    if before:
        fill(target, "old")

    def work() -> None:
        with run_directory(target, force=before) as writing:
            (writing / "results.json").write_text("mine")
            if before:
                target.rename(tmp_path / "elsewhere")
            target.mkdir()
            (target / "results.json").write_text("theirs")

    with pytest.raises(FileExistsError, match=r"left alone; this one stands in .*run-2$"):
        work()
    assert (target / "results.json").read_text() == "theirs"
    assert (tmp_path / "run-2" / "results.json").read_text() == "mine"
    assert names(tmp_path) == (["elsewhere"] if before else []) + ["run", "run-2"]


@pytest.mark.usefixtures("any_file_system")
def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with (
        pytest.raises(FileExistsError, match="appeared while this was being written"),
        new_folder(target),
    ):
        target.write_text("a file")
    assert target.read_text() == "a file"


KILLED = """
import os, signal, sys
from pathlib import Path
from immunize_ext import storage

target, when = Path(sys.argv[1]), sys.argv[2]
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if when == "before the move":
    storage._take_place = kill
elif when == "between two renames":
    storage._exchange = lambda first, second: False
    rename, calls = Path.rename, []
    def once(self, to):
        if calls:
            kill()
        calls.append(to)
        return rename(self, to)
    Path.rename = once
elif when == "after the move":
    storage.shutil.rmtree = kill
with storage.run_directory(target, force=True) as writing:
    (writing / "results.json").write_text("new")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "left"),
    [("before the move", "old"), ("between two renames", "old"), ("after the move", "new")],
)
def test_a_killed_process_loses_no_run_and_leaves_nothing_for_good(
    when: str, left: str, tmp_path: Path
) -> None:
    target = tmp_path / "run"
    fill(target, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), when], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    storage.clear_abandoned(target)
    assert (target / "results.json").read_text() == left
    fill(target, "newer")
    assert (target / "results.json").read_text() == "newer"
    assert names(tmp_path) == ["run"]


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "run") as outer:
        (outer / "results.json").write_text("slow")
        storage.clear_abandoned(tmp_path / "run")
        assert (outer / "results.json").read_text() == "slow"
    assert names(tmp_path) == ["run"]


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_umask_is_kept(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"x")
    fill(tmp_path / "run", "x")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o750


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "file", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


# --- checksums ------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "theta.safetensors"
    tensors = {"theta": torch.arange(6, dtype=torch.float64).reshape(2, 3), "step": torch.ones(1)}
    values = {"method": "closed_form", "seed": 3, "notes": ["a"]}
    save_checkpoint(path, tensors, kind="theta 1", values=values)
    content = bytearray(path.read_bytes())

    def refused() -> bool:
        try:
            load_checkpoint(path, kind="theta 1", function="load")
        except ValueError as error:
            return str(error).startswith("load: path must ")
        return False

    for position in range(8 * len(content)):
        content[position // 8] ^= 1 << position % 8
        path.write_bytes(content)
        assert refused(), f"bit {position}"
        content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)
    found, read = load_checkpoint(path, kind="theta 1", function="load")
    assert read == values
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_checkpoints_without_a_checksum_still_load(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "old.safetensors"
    save_file({"x": torch.ones(2)}, path, metadata={"kind": "old 1", "seed": "3"})
    tensors, values = load_checkpoint(path, kind="old 1", function="load")
    assert (tensors["x"].tolist(), values) == ([1.0, 1.0], {"seed": 3})
    with pytest.raises(ValueError, match="path must hold other 1, got old 1"):
        load_checkpoint(path, kind="other 1", function="load")


@pytest.mark.parametrize("change", ["flip", "remove", "sums"])
def test_a_sealed_folder_shows_every_change(change: str, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights.safetensors").write_bytes(bytes(100))
    (tmp_path / "model_index.json").write_text("{}")
    check_sealed(tmp_path, function="load")  # of others, without checksums
    seal_folder(tmp_path)
    check_sealed(tmp_path, function="load")
    weights = tmp_path / "unet" / "weights.safetensors"
    if change == "flip":
        weights.write_bytes(bytes(99) + b"\x01")
    elif change == "remove":
        weights.unlink()
    else:
        sums = (tmp_path / storage.SUMS).read_text()
        (tmp_path / storage.SUMS).write_text(sums.replace("weights", "weight"))
    with pytest.raises(ValueError, match=r"load: .* is missing or damaged; make it again"):
        check_sealed(tmp_path, function="load")


def test_digest_tells_everything_apart_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    parts: list[object] = [
        None, 0, False, 0.0, math.inf, "0", "", b"0", [], {}, [[]], ["a", "b"], ["ab"], {"a": 1},
        {"a": "1"}, {"b": 1}, torch.zeros(1), torch.zeros(1, 1), torch.zeros(1).double(),
        np.zeros(1), tmp_path / "a", tmp_path / "b", torch.nn.Linear(1, 1), [1, 2], [2, 1],
    ]  # fmt: skip
    found = [digest(part) for part in parts] + [digest(), digest("a", "b"), digest("b", "a")]
    assert len(set(found)) == len(found)
    assert digest({"a": 1, "b": [2]}) == digest({"b": (2,), "a": 1})
    assert digest(tmp_path / "a") == digest(Path(tmp_path / "a"))
    with pytest.raises(TypeError, match="got a generator"):
        digest(x for x in ())


# --- results.json ---------------------------------------------------------------------------------


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "results.json").write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "must be JSON"),
        ("[]", "must be of kind kappa"),
        ('{"kind": "photo"}', "must be of kind kappa.*got 'photo'"),
        ('{"kind": ["kappa"]}', "must be of kind kappa"),
        ('{"kind": "kappa", "schema": 3}', "must be of schema 1 to 2, got 3"),
        ("[" * 100_000, "must be JSON"),
    ],
)
def test_results_of_the_wrong_kind_are_one_line(
    text: str, words: str, run_of: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match=words):
        read_results(run_of(text))


def test_results_say_their_schema(run_of: Callable[[str], Path]) -> None:
    current = {"kind": "kappa", "schema": storage.SCHEMA, "rir": {"official": 2.0}}
    assert read_results(run_of(json.dumps(current))) == current
    assert migrate(current) == current


SCHEMA_1 = sorted((Path(__file__).parent / "report" / "data" / "schema_1").glob("*.json"))


@pytest.mark.parametrize("path", SCHEMA_1, ids=lambda path: path.stem)
def test_results_of_schema_1_are_read(path: Path, run_of: Callable[[str], Path]) -> None:
    old = json.loads(path.read_text(encoding="utf-8"))
    if old["kind"] not in storage.KINDS:
        pytest.skip("no run")  # a comparison is drawn again, and not read as a run
    found = read_results(run_of(json.dumps(old)))
    assert found["schema"] == storage.SCHEMA
    assert migrate(found) == found
    if old["kind"] == "kappa":
        assert found["request"]["settings"]["strength"] == old["request"]["c"]
        assert found["request"]["attacks"] == old["request"]["attackers"]
        assert found["request"]["seed"] == old["request"]["seed"]
        assert found["knob"]["name"] == "strength"
    if old["kind"] == "demo":
        assert [found[kind]["kind"] for kind in ("kappa", "mima")] == ["kappa", "mima"]
        assert found["mima"]["evaluation"] == old["mima_run"]["evaluation"]
    unchanged = set(old) - {"request", "knob", "mima", "mima_run", "kappa", "schema"}
    assert all(found[name] == old[name] for name in unchanged)


def test_results_that_lack_what_their_kind_has_are_one_line(run_of: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="must hold what a kappa run wrote, got no 'request'"):
        read_results(run_of('{"kind": "kappa"}'))
