"""Result files: rows, targets, the JSON that is written, and what a valid one holds."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ._timing import Measurement, Statistic

SCHEMA = 1
BENCHMARKS = ("merge", "spectrum")
DEVICES = ("cpu", "cuda")
PHASES = ("forward", "backward", "both")
ROLES = ("ours", "baseline", "floor", "rival")


@dataclass(frozen=True)
class Target:
    """A number to reach.

    Attributes:
        kind: ``faster``: time of ``against`` divided by time of ``challenger`` is at least
            ``value``; ``within``: time of ``challenger`` divided by time of ``against`` is at most
            ``value``.
        against: Name of the contender that is compared with.
        value: The ratio to reach.
        challenger: Name of the contender that has to reach it.
    """

    kind: Literal["faster", "within"]
    against: str
    value: float
    challenger: str = "ours"

    def wording(self) -> str:
        """The target in words, as the table prints it."""
        if self.kind == "faster":
            return f"{self.challenger} at least {self.value:g}x as fast as {self.against}"
        return f"{self.challenger} at most {self.value:g}x the time of {self.against}"


def evaluate(target: Target, medians: Mapping[str, float | None], judge: bool) -> dict[str, Any]:
    """The target with the measured ratio; ``met`` is None where it cannot be or is not judged."""
    challenger, against = medians.get(target.challenger), medians.get(target.against)
    measured: float | None = None
    met: bool | None = None
    if challenger and against:
        measured = against / challenger if target.kind == "faster" else challenger / against
        if judge:
            met = measured >= target.value if target.kind == "faster" else measured <= target.value
    return {
        "kind": target.kind,
        "challenger": target.challenger,
        "against": target.against,
        "value": target.value,
        "wording": target.wording(),
        "measured": measured,
        "met": met,
    }


def _statistic(statistic: Statistic | None) -> dict[str, Any] | None:
    return None if statistic is None else statistic._asdict()


def contender_record(measurement: Measurement) -> dict[str, Any]:
    """One contender of a row as JSON."""
    contender = measurement.contender
    error = measurement.relative_error
    return {
        "name": contender.name,
        "label": contender.label,
        "role": contender.role,
        "forward": _statistic(measurement.forward),
        "backward": _statistic(measurement.backward),
        "both": _statistic(measurement.both),
        # JSON has no NaN.
        "relative_error": error if error is not None and math.isfinite(error) else None,
        "tolerance": None if contender.check is None else contender.tolerance,
        "peak_mib": measurement.peak_mib,
        "refused": measurement.refused,
    }


def row_record(
    *,
    identifier: str,
    title: str,
    sizes: Mapping[str, int],
    dtype: str,
    per: str,
    measurements: Sequence[Measurement],
    targets: Sequence[Target],
    missing: Sequence[str],
    note: str,
    sweep: Mapping[str, Any] | None,
    judge: bool,
) -> dict[str, Any]:
    """One row as JSON: what was done, by whom, in what time, against which targets."""
    contenders = [contender_record(measurement) for measurement in measurements]
    medians = {
        entry["name"]: None if entry["both"] is None else entry["both"]["median"]
        for entry in contenders
    }
    return {
        "id": identifier,
        "title": title,
        "sizes": dict(sizes),
        "dtype": dtype,
        "per": per,
        "contenders": contenders,
        "targets": [evaluate(target, medians, judge) for target in targets],
        "missing": list(missing),
        "note": note,
        "sweep": None if sweep is None else dict(sweep),
    }


def document(
    benchmark: str,
    environment: Mapping[str, Any],
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The whole result file."""
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "unit": "ms",
        "environment": dict(environment),
        "settings": dict(settings),
        "rows": [dict(row) for row in rows],
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a valid result file; a reader never sees half of one."""
    validate(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any]:
    """Read a result file and check it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        validate(content)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"read: {path} must be a result file of these benchmarks, got {error}; run the "
            "benchmark again"
        ) from error
    assert isinstance(content, dict)
    return content


def file_name(benchmark: str, device: str) -> str:
    """Name of a result file."""
    return f"{benchmark}-{device}.json"


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """The result files of these benchmarks in a folder, by name; others are left alone."""
    names = sorted(file_name(benchmark, device) for benchmark in BENCHMARKS for device in DEVICES)
    return [read(folder / name) for name in names if (folder / name).is_file()]


_DOCUMENT: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "benchmark": str,
    "unit": str,
    "environment": dict,
    "settings": dict,
    "rows": list,
}
_ENVIRONMENT: dict[str, type | tuple[type, ...]] = {
    "command": str,
    "date": str,
    "device": str,
    "device_name": str,
    "cpu": str,
    "cores": int,
    "threads": int,
    "torch": str,
    "numpy": str,
    "scipy": str,
    "blas": list,
    "commit": (str, type(None)),
    "modified": (bool, type(None)),
}
_ROW: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "title": str,
    "sizes": dict,
    "dtype": str,
    "per": str,
    "contenders": list,
    "targets": list,
    "missing": list,
    "note": str,
    "sweep": (dict, type(None)),
}
_CONTENDER: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "label": str,
    "role": str,
    "forward": (dict, type(None)),
    "backward": (dict, type(None)),
    "both": (dict, type(None)),
    "relative_error": (float, int, type(None)),
    "tolerance": (float, int, type(None)),
    "peak_mib": (float, int, type(None)),
    "refused": (str, type(None)),
}
_TARGET: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "challenger": str,
    "against": str,
    "value": (float, int),
    "wording": str,
    "measured": (float, int, type(None)),
    "met": (bool, type(None)),
}


def _require(
    where: str, value: Any, fields: Mapping[str, type | tuple[type, ...]]
) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {type(value).__name__}")
    for name, kind in fields.items():
        if name not in value:
            raise ValueError(f"{where} lacks {name}")
        if not isinstance(value[name], kind):
            raise ValueError(f"{where}.{name} has type {type(value[name]).__name__}")
    return value


def validate(content: Any) -> None:
    """Raise ``ValueError`` naming the first place where ``content`` is no valid result file."""
    top = _require("result", content, _DOCUMENT)
    if top["schema"] != SCHEMA:
        raise ValueError(f"result.schema must be {SCHEMA}, got {top['schema']}")
    _require("environment", top["environment"], _ENVIRONMENT)
    for number, row in enumerate(top["rows"]):
        where = f"rows[{number}]"
        _require(where, row, _ROW)
        for entry in row["contenders"]:
            _require(f"{where}.contenders", entry, _CONTENDER)
            if entry["role"] not in ROLES:
                raise ValueError(
                    f"{where}.contenders: role {entry['role']!r} is not one of {ROLES}"
                )
            if entry["refused"] is None and entry["both"] is None:
                raise ValueError(f"{where}.contenders: {entry['name']} has no time and no reason")
            for phase in PHASES:
                if entry[phase] is not None:
                    _require(
                        f"{where}.{entry['name']}.{phase}",
                        entry[phase],
                        {
                            "median": (float, int),
                            "q25": (float, int),
                            "q75": (float, int),
                            "minimum": (float, int),
                            "samples": int,
                        },
                    )
        for target in row["targets"]:
            _require(f"{where}.targets", target, _TARGET)
