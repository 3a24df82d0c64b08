"""One image file of any kind: every layout read as (bands, H, W), and what cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from data.decode import AlikeFiles, fitted, read_bands, read_colours, refuse_sizes
from tests.examples.files import values, write

ROWS = np.arange(2)


@pytest.mark.parametrize("bands", [1, 3, 4])
def test_a_png_keeps_its_bands(tmp_path: Path, bands: int) -> None:
    image = values(6, 5, bands)
    write(tmp_path / "a.png", image[..., 0] if bands == 1 else image)
    found = read_bands(tmp_path / "a.png")
    assert found.dtype == np.uint8
    assert np.array_equal(found, image.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float32", "float64"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("bands", [1, 2, 3, 13])
def test_a_tiff_of_any_bands(tmp_path: Path, kind: str, planar: str, bands: int) -> None:
    image = values(16, 20, bands, kind=kind)
    stored = image if planar == "contig" else image.transpose(2, 0, 1)
    tifffile.imwrite(
        tmp_path / "a.tif", stored if bands > 1 else image[..., 0], photometric="minisblack",
        planarconfig=planar if bands > 1 else None,
    )  # fmt: skip
    found = read_bands(tmp_path / "a.tif")
    assert found.dtype == (np.uint8 if kind == "uint8" else np.float32)
    assert np.array_equal(found, image.transpose(2, 0, 1))


def test_a_tiff_whose_pages_are_bands(tmp_path: Path) -> None:
    image = values(6, 16, 20, kind="uint16")
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in image:
            file.write(page, contiguous=True)
    assert np.array_equal(read_bands(tmp_path / "a.tif"), image)


def test_a_compressed_tiff_by_deflate(tmp_path: Path) -> None:
    image = values(16, 20, 5, kind="uint16")
    tifffile.imwrite(tmp_path / "a.tif", image, compression="zlib", photometric="minisblack")
    assert np.array_equal(read_bands(tmp_path / "a.tif"), image.transpose(2, 0, 1))


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 2), (2, 6, 5)])
def test_an_array_in_either_order(tmp_path: Path, shape: tuple[int, ...]) -> None:
    image = values(*shape, kind="float32")
    write(tmp_path / "a.npy", image)
    expected = image[None] if len(shape) == 2 else image
    if shape[-1] == 2:
        expected = image.transpose(2, 0, 1)
    assert np.array_equal(read_bands(tmp_path / "a.npy"), expected)


def test_other_kinds_of_photograph(tmp_path: Path) -> None:
    colours = Image.fromarray(values(8, 8, 3))
    colours.quantize(16).save(tmp_path / "palette.png")
    Image.fromarray(values(8, 8) > 127).save(tmp_path / "bits.png")
    Image.fromarray(values(8, 8, kind="uint16")).save(tmp_path / "deep.png")
    colours.save(tmp_path / "a.jpg")
    colours.convert("CMYK").save(tmp_path / "print.jpg")
    assert read_bands(tmp_path / "palette.png").shape == (3, 8, 8)
    assert set(np.unique(read_bands(tmp_path / "bits.png"))) == {0, 255}
    deep = read_bands(tmp_path / "deep.png")
    assert np.array_equal(deep, values(8, 8, kind="uint16")[None])
    assert deep.dtype == np.float32
    assert read_bands(tmp_path / "a.jpg").shape == (3, 8, 8)
    assert read_bands(tmp_path / "print.jpg").shape == (3, 8, 8)


@pytest.mark.parametrize("bands", [3, 4])
def test_a_webp_is_read(tmp_path: Path, bands: int) -> None:
    image = values(8, 8, bands) | np.uint8(1)
    Image.fromarray(image).save(tmp_path / "a.webp", lossless=True)
    assert np.array_equal(read_bands(tmp_path / "a.webp"), image.transpose(2, 0, 1))


def test_a_bitmap_is_read_whatever_its_width(tmp_path: Path) -> None:
    image = values(8, 54, 3)  # 164 bytes a row
    Image.fromarray(image).save(tmp_path / "a.bmp")
    assert np.array_equal(read_bands(tmp_path / "a.bmp"), image.transpose(2, 0, 1))


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    upright, exif = values(6, 4, 3), Image.Exif()
    exif[0x0112] = 6  # held on its side
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a.png", exif=exif)
    write(tmp_path / "b.png", upright)
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for read in (read_bands, read_colours):
        assert np.array_equal(read(files[0]), upright.transpose(2, 0, 1))
    refuse_sizes(AlikeFiles(files))


@pytest.mark.parametrize("layout", ["contig", "pages"])
def test_a_tiff_of_many_bands_is_no_photograph(tmp_path: Path, layout: str) -> None:
    image = values(13, 16, 20) if layout == "pages" else values(16, 20, 13)
    more = {} if layout == "pages" else {"planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", **more)
    with pytest.raises(ValueError, match=r"a TIFF of 13 bands in uint8, .*the recipe 'pairs'"):
        read_colours(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32"])
def test_grey_values_that_colours_would_cut_at_255_are_refused(tmp_path: Path, kind: str) -> None:
    Image.fromarray(values(8, 8, kind=kind)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"deep\.tif has grey values of more than 8 bits"):
        read_colours(tmp_path / "deep.tif")


def test_the_middle_is_kept() -> None:
    image = np.zeros((1, 4, 8), dtype=np.uint8)
    image[:, :, 2:6] = 200
    assert (fitted(image, 4) == 200).all()
    assert fitted(image, 2).shape == (1, 2, 2)
    assert fitted(image.astype(np.float32), 6).dtype == np.float32
    framed = fitted(values(3, 64, 64), 32, margin=2.0)
    assert np.array_equal(framed, values(3, 64, 64)[:, 16:48, 16:48])


def test_files_must_be_alike(tmp_path: Path) -> None:
    first = write(tmp_path / "first.png", values(8, 8, 3))
    grey = write(tmp_path / "grey.png", values(8, 8))
    small = write(tmp_path / "small.png", values(8, 6, 3))
    deep = write(tmp_path / "deep.tif", values(8, 8, 3, kind="uint16"))
    with pytest.raises(ValueError, match=r"grey\.png has 1 band\(s\), .*first\.png has 3; fix:"):
        AlikeFiles([first, grey])(ROWS)
    with pytest.raises(ValueError, match=r"small\.png is 8x6, .*first\.png is 8x8; fix: --size"):
        AlikeFiles([first, small])(ROWS)
    with pytest.raises(ValueError, match=r"deep\.tif holds float32, .*first\.png holds uint8"):
        AlikeFiles([first, deep])(ROWS)
    with pytest.raises(ValueError, match=r"grey\.png has 1 band"):
        AlikeFiles([grey], like=first)(ROWS[:1])
    assert AlikeFiles([first, small], size=6)(ROWS).shape == (2, 3, 6, 6)
    assert AlikeFiles([first, grey], read=read_colours)(ROWS).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".npy"])
@pytest.mark.parametrize("damage", ["truncated", "junk", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    file = write(tmp_path / f"a{suffix}", values(40, 40, 3))
    content = {"truncated": file.read_bytes()[:900], "junk": b"no image", "empty": b""}
    file.write_bytes(content[damage])
    with pytest.raises(ValueError, match=rf"image .*a\{suffix} cannot be read \(.*\); fix:"):
        read_bands(file)


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    holes = values(6, 5, kind="float32")
    holes[2, 2] = np.nan
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        read_bands(write(tmp_path / "nan.npy", holes))
    with pytest.raises(ValueError, match="holds complex64"):
        read_bands(write(tmp_path / "complex.npy", holes.astype(np.complex64)))
    with pytest.raises(ValueError, match=r"the shape \(4, 2, 4\), of which the bands could be"):
        read_bands(write(tmp_path / "square.npy", values(4, 2, 4)))
    with pytest.raises(ValueError, match=r"the shape \(2, 3, 4, 5\), expected"):
        read_bands(write(tmp_path / "many.npy", values(2, 3, 4, 5)))
    Image.fromarray(values(8, 8, 3)).quantize(16).save(tmp_path / "palette.tif")
    with pytest.raises(ValueError, match="places in a palette"):
        read_bands(tmp_path / "palette.tif")
    Image.fromarray(values(8, 8, 3)).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"compressed by LZW.*fix: .*imagecodecs"):
            read_bands(tmp_path / "lzw.tif")
    else:
        assert read_bands(tmp_path / "lzw.tif").shape == (3, 8, 8)


def test_colours_of_16_bits_are_refused_rather_than_cut(tmp_path: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        whole = kind + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    rows = b"".join(b"\0" + bytes(4 * 3 * 2) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    (tmp_path / "deep.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )  # fmt: skip
    with pytest.raises(ValueError, match="colours of 16 bits, of which Pillow reads 8"):
        read_bands(tmp_path / "deep.png")
