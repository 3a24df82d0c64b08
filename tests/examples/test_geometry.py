"""From the radar's box to the camera's aim and back, and the two formulas that are in doubt."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes

from papers.__main__ import main
from papers.geometry import (
    EARTH,
    Aim,
    Bearing,
    Box,
    Camera,
    Place,
    Scan,
    aim,
    bearing_of_box,
    bearing_of_place,
    box_of_bearing,
    pixels_of_width,
    place_of_bearing,
    seen,
    width_of_box,
)

SCAN = Scan(width=4096, height=4096, reach=20_000.0, beam=0.1)
SANYA = Place(18.2, 109.5)
CAMERA = Camera(SANYA, height=40.0, zero=15.0, chip=7.2, focal=6.0)
AZIMUTHS = st.floats(0, 359.9)
DISTANCES = st.floats(50, 50_000)


def angle(first: float, second: float) -> float:
    return abs((first - second + 180) % 360 - 180)


@given(AZIMUTHS, st.floats(100, 19_000), st.floats(1, 200), st.floats(1, 200))
def test_a_box_and_its_bearing(azimuth: float, distance: float, w: float, h: float) -> None:
    box = box_of_bearing(Bearing(azimuth, distance), w, h, SCAN)
    found = bearing_of_box(box, SCAN)
    assert angle(found.azimuth, azimuth) < 1e-9
    assert found.distance == pytest.approx(distance, rel=1e-9)


def test_the_middle_of_a_box() -> None:
    box = Box(x=1014, y=2038, w=20, h=20)
    found = bearing_of_box(box, SCAN)
    assert (found.azimuth, found.distance) == (90.0, 10_000.0)
    printed = bearing_of_box(box, SCAN, "printed")
    assert printed.azimuth == found.azimuth
    # h / w = 1 pixel down instead of 10.
    assert printed.distance == pytest.approx(10_000 + 9 / 4096 * 20_000)


def test_both_formulas_of_the_distance_agree_where_two_is_the_width() -> None:
    box = Box(x=10, y=20, w=2, h=7)
    assert bearing_of_box(box, SCAN, "printed") == bearing_of_box(box, SCAN)


@given(st.floats(-80, 80), st.floats(-179, 179), AZIMUTHS, DISTANCES)
def test_a_place_and_its_bearing(
    latitude: float, longitude: float, azimuth: float, distance: float
) -> None:
    origin = Place(latitude, longitude)
    found = bearing_of_place(origin, place_of_bearing(origin, Bearing(azimuth, distance)))
    assert found.distance == pytest.approx(distance, rel=1e-6)
    assert angle(found.azimuth, azimuth) < 1e-4


def test_a_degree_north_and_a_degree_east() -> None:
    degree = math.pi / 180 * EARTH
    north = place_of_bearing(Place(18, 110), Bearing(0, degree))
    assert (north.latitude, north.longitude) == pytest.approx((19, 110))
    east = place_of_bearing(Place(0, 179.5), Bearing(90, degree))
    assert (east.latitude, east.longitude) == pytest.approx((0, -179.5))
    assert bearing_of_place(Place(0, 0), Place(0, 1)).azimuth == pytest.approx(90)
    assert bearing_of_place(SANYA, SANYA).distance == 0


@given(st.floats(3, 800), st.floats(200, 20_000))
def test_a_width_and_its_pixels(width: float, distance: float) -> None:
    w = pixels_of_width(width, SCAN, distance)
    assert width_of_box(Box(0, 0, w, 1), SCAN, distance) == pytest.approx(width, rel=1e-6)


def test_the_width_of_what_spans_an_angle() -> None:
    plain = Scan(width=360, height=100, reach=1000.0)
    # Two degrees of the circle at 1,000 m are a chord's 34.9 m.
    assert width_of_box(Box(0, 0, 2, 1), plain, 1000.0) == pytest.approx(34.91, abs=0.01)
    # As printed: the arc tangent of one, read as a plain number, times 2,000 m.
    printed = width_of_box(Box(0, 0, 2, 1), plain, 1000.0, "printed")
    assert printed == pytest.approx(math.pi / 4 * 2000)
    with pytest.raises(ValueError, match=r"must lie in \(0, 90\) degrees, got -0\.0"):
        width_of_box(Box(0, 0, 1, 1), Scan(4096, 100, 1000.0, beam=0.1), 1000.0)


@given(AZIMUTHS, DISTANCES, st.floats(2, 300))
def test_an_aim_and_what_is_seen(azimuth: float, distance: float, width: float) -> None:
    bearing, half = seen(CAMERA, aim(CAMERA, Bearing(azimuth, distance), width))
    assert angle(bearing.azimuth, azimuth) < 1e-9
    assert bearing.distance == pytest.approx(distance, rel=1e-9)
    assert half == pytest.approx(width, rel=1e-9)


def test_an_aim_by_hand() -> None:
    found = aim(CAMERA, Bearing(350, 4000.0), 50.0)
    assert found.pan == pytest.approx(5)
    assert found.tilt == pytest.approx(math.degrees(0.01), rel=1e-4)
    # 288 mm bring 100 m at 4,000 m to the chip's 7.2 mm: 48 times the smallest, 6 mm.
    assert found.zoom == pytest.approx(4000 * 7.2 / 100 / 6)


@given(AZIMUTHS, st.floats(300, 19_000), st.floats(10, 300))
def test_from_the_radar_to_the_camera_and_back(
    azimuth: float, distance: float, width: float
) -> None:
    radar, at = Place(18.21, 109.52), Bearing(azimuth, distance)
    box = box_of_bearing(at, pixels_of_width(width, SCAN, distance), 12.0, SCAN)
    ship = place_of_bearing(radar, bearing_of_box(box, SCAN))
    from_camera = bearing_of_place(CAMERA.place, ship)
    looking = aim(CAMERA, from_camera, width_of_box(box, SCAN, distance))
    bearing, half = seen(CAMERA, looking)
    back = bearing_of_place(radar, place_of_bearing(CAMERA.place, bearing))
    assert back.distance == pytest.approx(distance, abs=0.5)
    assert half == pytest.approx(width, rel=1e-6)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="wider and higher than 0, got 0 x 3"):
        Box(0, 0, 0, 3)
    with pytest.raises(ValueError, match="a scan needs width, height and reach above 0"):
        Scan(100, 100, 0.0)
    with pytest.raises(ValueError, match="latitude must lie in"):
        Place(91, 0)
    with pytest.raises(ValueError, match="a camera needs a height of at least 0"):
        Camera(SANYA, 10.0, 0.0, 7.2, 0.0)
    with pytest.raises(ValueError, match="must be above 0 metres, got 0 and 5"):
        aim(CAMERA, Bearing(0, 0), 5)
    with pytest.raises(ValueError, match="tilt must lie in"):
        seen(CAMERA, Aim(0, 0, 1))


# The command line.

WHERE = ("--radar", "18.2", "109.5", "--camera", "18.21", "109.5", "--height", "60")


def test_the_command_aims_at_every_box_by_both_kinds_of_formulas(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("x,y,w,h\n1000,2000,20,12\n30,4000,40,20\n")
    assert main(["geometry", str(boxes), *WHERE]) == 0
    lines = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [line["formulas"] for line in lines] == ["corrected", "printed"] * 2
    scan = Scan(4096, 4096, 20_000.0)
    place = place_of_bearing(SANYA, bearing_of_box(Box(1000, 2000, 20, 12), scan))
    bearing = bearing_of_place(Place(18.21, 109.5), place)
    width = width_of_box(Box(1000, 2000, 20, 12), scan, bearing.distance)
    expected = aim(Camera(Place(18.21, 109.5), 60, 0, 4.8, 6.0), bearing, width)
    found = [float(lines[0][name]) for name in ("pan", "tilt", "zoom", "width")]
    wanted = [expected.pan, expected.tilt, expected.zoom, width]
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has no columns x, y, w and h"),
        ("x,y,w,h\n1,2,0,4\n", "line 2: a box must be wider"),
        ("x,y,w,h\n1,2,four,4\n", "line 2: could not convert"),
    ],
)
def test_a_wrong_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    boxes = tmp_path / "boxes.csv"
    boxes.write_text(text)
    assert main(["geometry", str(boxes), *WHERE]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_the_figure_shows_what_the_command_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes, told = tmp_path / "boxes.csv", []
    boxes.write_text("x,y,w,h\n1000,2000,20,12\n30,4000,40,20\n")
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **more: told.append(text))
    path = tmp_path / "geometry.png"
    assert main(["geometry", str(boxes), *WHERE, "--figure", str(path)]) == 0
    lines = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    widths = [f"{float(line['width']):,.0f} m" for line in lines]
    assert told[0].splitlines()[1:] == [
        f"1: {widths[0]}, {widths[1]}",
        f"2: {widths[2]}, {widths[3]}",
    ]
    assert path.stat().st_size > 10_000
