"""Image files are read as they were meant: upright, on white, 16 bits by their scale."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from immunize_ext.images import content_digest, image_files, read_rgb, same_pictures

Image = pytest.importorskip("PIL.Image")


def test_exif_orientation_turns_the_picture(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 2] = 255  # upper right
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image.save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(read_rgb(tmp_path / "turned.png"))
    assert upright.shape == (3, 2, 3)
    np.testing.assert_array_equal(upright, np.rot90(pixels, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_colours_under_alpha_0_do_not_shine_through(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    path = tmp_path / "clear.png"
    if mode == "P":
        palette = Image.new("P", (2, 1), 0)
        palette.putpalette([200, 0, 0, 0, 0, 0])
        palette.putpixel((1, 0), 1)
        palette.save(path, transparency=0)
    else:
        image.convert(mode).save(path)
    assert np.asarray(read_rgb(path))[0].tolist() == [[255, 255, 255], [0, 0, 0]]


def test_half_transparent_is_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (0, 0, 0, 51)).save(tmp_path / "grey.png")
    assert read_rgb(tmp_path / "grey.png").getpixel((0, 0)) == (204, 204, 204)


def test_a_grey_ramp_of_16_bits_keeps_its_levels(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)[None]
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    found = np.asarray(read_rgb(tmp_path / "ramp.png"))[0, :, 0]
    assert len(set(found.tolist())) == 64
    np.testing.assert_allclose(found, ramp[0] / 257.0, atol=0.5)


def test_grey_of_8_bits_and_cmyk_are_as_before(tmp_path: Path) -> None:
    Image.new("L", (1, 1), 77).save(tmp_path / "grey.png")
    assert read_rgb(tmp_path / "grey.png").getpixel((0, 0)) == (77, 77, 77)
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "white.jpg")
    assert read_rgb(tmp_path / "white.jpg").getpixel((4, 4)) == (255, 255, 255)


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


@pytest.mark.parametrize("limit", [None, Image.MAX_IMAGE_PIXELS])
def test_a_small_file_that_claims_30000_x_30000_pixels_is_refused(
    limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another library has taken Pillow's own limit away."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    side = (30000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + bytes([8, 2, 0, 0, 0]))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=r"bomb.png must have at most 178,956,970 pixels"):
        read_rgb(tmp_path / "bomb.png")


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text.png must be an image, got: cannot identify"):
        read_rgb(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match="load: path must name an image"):
        read_rgb(tmp_path / "missing.png", function="load")
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "real.tiff")
    with pytest.raises(ValueError, match="real numbers, which have no scale"):
        read_rgb(tmp_path / "real.tiff")


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    for name in ("b.png", "._b.png", "deep/a.JPEG", ".cache/c.png", "deep/.d.png", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert image_files(tmp_path) == [tmp_path / "b.png"]
    assert image_files(tmp_path, recursive=True) == [tmp_path / "b.png", tmp_path / "deep/a.JPEG"]


def test_the_same_picture_is_found_by_its_content(tmp_path: Path) -> None:
    for name, content in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (tmp_path / name for name in "abc")
    assert same_pictures([a, b], [c]) == [(a, c)]
    assert same_pictures([a], [b]) == []
    assert content_digest(a) == content_digest(c) != content_digest(b)
