"""One flipped bit in every kind of file that is read: refused by name, or harmless.

Refused: an exception of a kind that the command line tells in one line (ValueError, OSError and
the package's own). Harmless: what is read equals what was read before. Lost: a traceback of another
kind, a crash, or numbers that differ without a word.

Files of others carry no checksum (an image, an .npz, weights of another program, text that its
user wrote): there a flip that leaves a valid file is another valid file, counted as "another", and
only crashes and foreign exceptions are losses.
"""

from __future__ import annotations

import gzip
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .counts import Count

# What immunize.cli reports without a traceback.
NAMED = (ValueError, OSError, ImportError)


@dataclass(frozen=True)
class Kind:
    """A file, how it is made and how it is read.

    Attributes:
        make: writes it into a folder and returns its path.
        read: reads the folder's file into something that ``==`` compares.
        ours: written by the package with a checksum: another content must be refused.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    ours: bool


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"theta": torch.randn(6, 6, generator=generator, dtype=torch.float64)}


def _make_checkpoint(folder: Path) -> Path:
    from immunize_ext.storage import save_checkpoint

    path = folder / "theta.safetensors"
    save_checkpoint(path, _tensors(), kind="theta 1", values={"method": "x", "seed": 3})
    return path


def _read_checkpoint(path: Path) -> Any:
    from immunize_ext.storage import load_checkpoint

    return _plain(load_checkpoint(path, kind="theta 1", function="load"))


def _make_immunized(folder: Path) -> Path:
    from immunize_ext.probing.immunizers import Immunized

    path = folder / "immunized.safetensors"
    theta = _tensors()["theta"]
    config = {"strength": 30.0, "seed": 0}
    Immunized("closed-form", theta, theta.T.contiguous(), config, [{"step": 0.0}]).save(path)
    return path


def _read_immunized(path: Path) -> Any:
    from immunize_ext.probing.immunizers import Immunized

    return _plain(vars(Immunized.load(path)))


def _make_factor(folder: Path) -> Path:
    from immunize_ext.ops import RegularizationFactor

    path = folder / "factor.safetensors"
    RegularizationFactor.from_embeddings(_tensors()["theta"], ridge=0.1).save(path)
    return path


def _read_factor(path: Path) -> Any:
    from immunize_ext.ops import RegularizationFactor

    return _plain(RegularizationFactor.load(path).chol)


def _make_moments(folder: Path) -> Path:
    from immunize_ext.ops import InputMoments, LayerMoments

    path, theta = folder / "moments.safetensors", _tensors()["theta"].double()
    LayerMoments({"k": InputMoments(theta.mT @ theta, len(theta))}).save(path)
    return path


def _read_moments(path: Path) -> Any:
    from immunize_ext.ops import LayerMoments

    moments = LayerMoments.load(path)
    return _plain({layer: tuple(one) for layer, one in moments.items()})


def _make_safetensors(folder: Path) -> Path:
    from safetensors.torch import save_file

    path = folder / "features.safetensors"
    save_file({"x": _tensors()["theta"], "y": torch.arange(6) % 2}, path)
    return path


def _make_npz(folder: Path) -> Path:
    path = folder / "features.npz"
    np.savez(path, x=_tensors()["theta"].numpy(), y=np.arange(6) % 2)
    return path


def _make_packed_npz(folder: Path) -> Path:
    path = folder / "features.npz"
    np.savez_compressed(path, x=_tensors()["theta"].numpy(), y=np.arange(6) % 2)
    return path


def _read_features(path: Path) -> Any:
    from immunize_ext.probing.data.features import load_features

    return _plain(list(load_features(path)))


def _make_mnist(folder: Path) -> Path:
    generator = np.random.default_rng(4)
    images = generator.integers(0, 256, size=(20, 28, 28), dtype=np.uint8)
    labels = (np.arange(20) % 10).astype(np.uint8)
    for kind, array, magic in (("images-idx3", images, 2051), ("labels-idx1", labels, 2049)):
        header = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
        packed = gzip.compress(header + array.tobytes(), mtime=0)
        (folder / f"train-{kind}-ubyte.gz").write_bytes(packed)
    return folder / "train-labels-idx1-ubyte.gz"


def _read_mnist(path: Path) -> Any:
    from immunize_ext.probing.data import load_mnist

    return _plain(list(load_mnist(path.parent)))


def _make_results(folder: Path) -> Path:
    from immunize_ext.storage import write_json

    path = folder / "results.json"
    write_json(path, {"schema": 2, "kind": "kappa", "settings": {"seed": 0}, "values": [1.5]})
    return path


def _read_results(path: Path) -> Any:
    from immunize_ext.storage import read_results

    return read_results(path.parent)


def _job() -> dict[str, Any]:
    return {"value": 2.5}


def _make_point(folder: Path) -> Path:
    from immunize_ext.sweep import run_jobs

    run_jobs({"point": _job}, folder)
    return folder / "point.json"


def _read_point(path: Path) -> Any:
    from immunize_ext.sweep import run_jobs

    return run_jobs({"point": _job}, path.parent)


def _make_png(folder: Path) -> Path:
    from PIL import Image

    path = folder / "image.png"
    generator = np.random.default_rng(5)
    Image.fromarray(generator.integers(0, 256, size=(12, 12, 3), dtype=np.uint8)).save(path)
    return path


def _read_png(path: Path) -> Any:
    from immunize_ext.images import read_rgb

    return _plain(np.asarray(read_rgb(path)))


def _make_config(folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text("steps: 20\nmax_train: 60\nseed: 3\nmethod: closed-form\nridge: 0.01\n")
    return path


def _read_config(path: Path) -> Any:
    from immunize_ext.settings import read_yaml

    return read_yaml(path)


def _make_concepts(folder: Path) -> Path:
    from PIL import Image

    for number, split in enumerate(("attack", "immunize")):
        (folder / split).mkdir()
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / split / "cat.png")
    path = folder / "concepts.yaml"
    path.write_text(
        "concepts:\n"
        "  - {name: cat, prompts: [a photo of a cat, cat], anchor: animal,\n"
        "     images: {attack: attack, immunize: immunize}}\n"
        "captions: [a house, two boats]\n"
    )
    return path


def _read_concepts(path: Path) -> Any:
    from immunize_ext.text_to_image.concepts import load_concepts

    found = load_concepts(path, size=8)
    return repr((found.concepts, found.retain, found.captions))


def _make_pipeline(folder: Path) -> Path:
    import immunize_ext.text_to_image.digits as digits
    from immunize_ext.storage import seal_folder

    source = Path(digits.__file__).parent / "digits_weights"
    shutil.copytree(source, folder / "pipeline", ignore=shutil.ignore_patterns("*.md"))
    seal_folder(folder / "pipeline")
    return folder / "pipeline"


def _read_pipeline(path: Path) -> Any:
    from immunize_ext.storage import check_sealed

    check_sealed(path, function="load")
    return "as it was"


KINDS = {
    "checkpoint (theta, loop, factor, attack weights)": Kind(
        _make_checkpoint, _read_checkpoint, True
    ),
    "immunized theta": Kind(_make_immunized, _read_immunized, True),
    "regularisation factor": Kind(_make_factor, _read_factor, True),
    "second moments": Kind(_make_moments, _read_moments, True),
    "pipeline folder, every file": Kind(_make_pipeline, _read_pipeline, True),
    "MNIST (gzip)": Kind(_make_mnist, _read_mnist, True),
    "features (.npz)": Kind(_make_npz, _read_features, True),
    "features (.npz, compressed)": Kind(_make_packed_npz, _read_features, True),
    "features (.safetensors)": Kind(_make_safetensors, _read_features, False),
    "image (PNG)": Kind(_make_png, _read_png, True),
    "results.json": Kind(_make_results, _read_results, False),
    "point of a sweep": Kind(_make_point, _read_point, False),
    "settings (YAML)": Kind(_make_config, _read_config, False),
    "concepts.yaml": Kind(_make_concepts, _read_concepts, False),
}


def flips(name: str, count: int, seed: int, work: Path) -> Count:
    """So many flipped bits, one at a time, of one kind of file."""
    kind, found, generator = KINDS[name], Count(), random.Random(f"{seed} {name}")
    folder = work / "flips"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = kind.make(folder)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    original = kind.read(path)
    contents = {file: file.read_bytes() for file in files}
    for _ in range(count):
        file = generator.choice(files)
        content = bytearray(contents[file])
        bit = generator.randrange(8 * len(content)) if content else None
        if bit is None:
            continue  # an empty file has no bit
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        where = f"{file.name}, bit {bit}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read = kind.read(path)
        except NAMED:
            found.survived("refused")
        except Exception as error:
            found.lose(f"{where}: {type(error).__name__}: {error}"[:400])
        else:
            if read == original:
                found.survived("harmless")
            elif kind.ours:
                found.lose(f"{where}: other content without a word")
            else:
                found.survived("another valid file")
        finally:
            for one, before in contents.items():
                if not one.exists() or one.read_bytes() != before:
                    one.write_bytes(before)
    return found
