"""How the DSKD paper's radar and camera were brought to look at one ship (its 5.1, Eq. 13-16).

A box in the radar's image gives azimuth and distance (13), these the ship's latitude and longitude,
these the camera's pan and tilt (14) and, with the ship's width (16), its zoom (15). Angles are in
degrees, lengths in metres unless a name says otherwise. The earth is a sphere.

Two of the printed formulas look wrong. Each is here as printed and as corrected:

- Eq. 13 takes ``h / w`` from the row, a ratio where a number of pixels is needed. Half of the
  height, ``h / 2``, leads to the middle of the box, as ``w / 2`` does in the azimuth.
- Eq. 16 takes the arc tangent of an angle. The width of what spans an angle is the tangent of half
  of it, times twice the distance. Half of the box's angle is ``180 w / X``; from it the printed
  formula takes all of b, so its b must be the share of one side: half of the beam's width.

``python examples/papers geometry boxes.csv --radar 18.2 109.5 ...`` prints all of it for boxes.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro
from matplotlib.patches import Circle

from papers.figures import LONE, PALETTE, drawing

EARTH = 6_371_008.8  # metres, mean radius (IUGG)
Formula = Literal["corrected", "printed"]


@dataclass(frozen=True)
class Box:
    """A target in the radar's image, in pixels: left, top, width and height."""

    x: float
    y: float
    w: float
    h: float

    def __post_init__(self) -> None:
        if not (self.w > 0 and self.h > 0):
            raise ValueError(f"a box must be wider and higher than 0, got {self.w} x {self.h}")


@dataclass(frozen=True)
class Scan:
    """The radar's image: azimuth along its rows from north, distance up its columns.

    Attributes:
        width, height: X and Y, in pixels; the width is 360 degrees.
        reach: R, the distance of the top row, in metres.
        beam: b, what the beam's width adds to each side of a target, in degrees.
    """

    width: int
    height: int
    reach: float
    beam: float = 0.0

    def __post_init__(self) -> None:
        if not (self.width > 0 and self.height > 0 and self.reach > 0 and self.beam >= 0):
            raise ValueError(
                f"a scan needs width, height and reach above 0 and a beam of at least 0, got {self}"
            )


@dataclass(frozen=True)
class Bearing:
    """Where something is from somewhere: degrees clockwise from north, metres."""

    azimuth: float
    distance: float


@dataclass(frozen=True)
class Place:
    """Latitude and longitude in degrees."""

    latitude: float
    longitude: float

    def __post_init__(self) -> None:
        if not -90 <= self.latitude <= 90:
            raise ValueError(f"latitude must lie in [-90, 90], got {self.latitude}")


@dataclass(frozen=True)
class Camera:
    """The optical sensor.

    Attributes:
        place: P3.
        height: L, above the water, in metres.
        zero: B, what is added to an azimuth from north to get a pan, in degrees.
        chip: I, the length of its CCD, in millimetres.
        focal: f, the smallest focal length, in millimetres.
    """

    place: Place
    height: float
    zero: float
    chip: float
    focal: float

    def __post_init__(self) -> None:
        if not (self.height >= 0 and self.chip > 0 and self.focal > 0):
            raise ValueError(
                "a camera needs a height of at least 0, chip and focal length above 0, got "
                f"{self.height}, {self.chip}, {self.focal}"
            )


@dataclass(frozen=True)
class Aim:
    """Pan and tilt in degrees (down is positive), zoom in smallest focal lengths."""

    pan: float
    tilt: float
    zoom: float


def bearing_of_box(box: Box, scan: Scan, formula: Formula = "corrected") -> Bearing:
    """Eq. 13: A1 = (x + w/2) / X * 360, D1 = (Y - y - h/2) / Y * R; printed with h/w for h/2."""
    down = box.h / 2 if formula == "corrected" else box.h / box.w
    return Bearing(
        (box.x + box.w / 2) / scan.width * 360 % 360,
        (scan.height - box.y - down) / scan.height * scan.reach,
    )


def box_of_bearing(bearing: Bearing, w: float, h: float, scan: Scan) -> Box:
    """The box of that width and height, in pixels, whose middle lies there: Eq. 13 backwards."""
    return Box(
        bearing.azimuth / 360 * scan.width - w / 2,
        scan.height - bearing.distance / scan.reach * scan.height - h / 2,
        w,
        h,
    )


def place_of_bearing(origin: Place, bearing: Bearing) -> Place:
    """P2 from P1 and (A1, D1): along a great circle of a sphere."""
    lat, lon, azimuth = (
        math.radians(angle) for angle in (origin.latitude, origin.longitude, bearing.azimuth)
    )
    arc = bearing.distance / EARTH
    sine = math.sin(lat) * math.cos(arc) + math.cos(lat) * math.sin(arc) * math.cos(azimuth)
    east = math.atan2(
        math.sin(azimuth) * math.sin(arc) * math.cos(lat), math.cos(arc) - math.sin(lat) * sine
    )
    longitude = (math.degrees(lon + east) + 180) % 360 - 180
    return Place(math.degrees(math.asin(max(-1.0, min(1.0, sine)))), longitude)


def bearing_of_place(origin: Place, target: Place) -> Bearing:
    """(A2, D2) from P3 to P2: the great circle's first azimuth and its length (haversine)."""
    lat, other = math.radians(origin.latitude), math.radians(target.latitude)
    east = math.radians(target.longitude - origin.longitude)
    half = (
        math.sin((other - lat) / 2) ** 2 + math.cos(lat) * math.cos(other) * math.sin(east / 2) ** 2
    )
    azimuth = math.atan2(
        math.sin(east) * math.cos(other),
        math.cos(lat) * math.sin(other) - math.sin(lat) * math.cos(other) * math.cos(east),
    )
    return Bearing(math.degrees(azimuth) % 360, 2 * EARTH * math.asin(math.sqrt(min(1.0, half))))


def width_of_box(box: Box, scan: Scan, distance: float, formula: Formula = "corrected") -> float:
    """Eq. 16: W = tan(180 w / X - b) * 2 D, in metres; printed with arctan, of degrees, for tan.

    Args:
        box, scan: in pixels.
        distance: the paper's D2, from the camera, in metres. The box's angle is the radar's: where
            the two stand apart, D1 is the distance that belongs to it.
        formula: the printed one reads its number of degrees as a plain number.

    Raises:
        ValueError: the beam alone is as wide as the box, or the box half of the circle.
    """
    half = 180 * box.w / scan.width - scan.beam
    if not 0 < half < 90:
        raise ValueError(
            f"half of the target's angle must lie in (0, 90) degrees, got {half:g}: a box of "
            f"{box.w:g} of {scan.width} pixels and a beam of {scan.beam:g}"
        )
    spread = math.tan(math.radians(half)) if formula == "corrected" else math.atan(half)
    return spread * 2 * distance


def pixels_of_width(width: float, scan: Scan, distance: float) -> float:
    """The w of a box for a target of so many metres: the corrected Eq. 16 backwards."""
    half = math.degrees(math.atan(width / (2 * distance)))
    return (half + scan.beam) * scan.width / 180


def aim(camera: Camera, bearing: Bearing, width: float) -> Aim:
    """Eq. 14 and 15: P = A2 + B, T = arctan(L / D2), Z = D2 I / (2 W f).

    The target then takes half of the image's length.

    Args:
        camera: the optical sensor.
        bearing: (A2, D2), of the target from the camera.
        width: W, of the target in metres.

    Raises:
        ValueError: distance or width is not above 0.
    """
    if not (bearing.distance > 0 and width > 0):
        raise ValueError(
            f"distance and width must be above 0 metres, got {bearing.distance} and {width}"
        )
    return Aim(
        (bearing.azimuth + camera.zero) % 360,
        math.degrees(math.atan2(camera.height, bearing.distance)),
        bearing.distance * camera.chip / (2 * width * camera.focal),
    )


def seen(camera: Camera, looking: Aim) -> tuple[Bearing, float]:
    """What a camera so aimed looks at, Eq. 14 and 15 backwards: where, and how wide is half of it.

    Raises:
        ValueError: it does not look down, so that it meets no water.
    """
    if not (0 < looking.tilt <= 90 and looking.zoom > 0):
        raise ValueError(
            f"tilt must lie in (0, 90] degrees and zoom above 0, got {looking.tilt}, {looking.zoom}"
        )
    distance = camera.height / math.tan(math.radians(looking.tilt))
    azimuth = (looking.pan - camera.zero) % 360
    return Bearing(azimuth, distance), distance * camera.chip / (2 * looking.zoom * camera.focal)


@dataclass(frozen=True)
class Options:
    """Pan, tilt and zoom of the camera, and the width of the ship, for boxes in radar images.

    Angles are in degrees, lengths in metres unless the name says otherwise.
    """

    # CSV file with columns x, y, w and h, in pixels.
    boxes: Annotated[Path, tyro.conf.Positional]
    # Latitude and longitude of the radar (P1).
    radar: tuple[float, float]
    # Latitude and longitude of the camera (P3); the radar's by default.
    camera: tuple[float, float] | None = None
    # Width and height of the radar's images, in pixels (X, Y).
    size: tuple[int, int] = (4096, 4096)
    # Distance of the top row (R).
    reach: float = 20_000.0
    # What the beam's width adds to each side of a target (b).
    beam: float = 0.0
    # Height of the camera above the water (L).
    height: float = 50.0
    # What is added to an azimuth from north to get a pan (B).
    zero: float = 0.0
    # Length of the camera's chip, in millimetres (I).
    chip: float = 4.8
    # Smallest focal length, in millimetres (f).
    focal: float = 6.0
    # Draw it, from above and from the side, into this PNG.
    figure: Path | None = None


def command(arguments: Sequence[str], _: str) -> int:
    """Writes CSV to the console: every box by the corrected formulas and by the printed ones."""
    options = tyro.cli(Options, args=list(arguments), prog="papers geometry")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["x", "y", "w", "h", "formulas", "pan", "tilt", "zoom", "width"])
    found = list(aimed(options))
    for sight in found:
        line = *vars(sight.box).values(), sight.formula, *vars(sight.aim).values(), sight.width
        writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in line)
    if options.figure is not None:
        draw(options, found, options.figure)
    return 0


@dataclass(frozen=True)
class Sight:
    """A box and one kind of formulas: the ship's place and width, and where the camera looks."""

    box: Box
    formula: Formula
    place: Place
    bearing: Bearing  # from the camera
    width: float
    aim: Aim


def aimed(options: Options) -> Iterator[Sight]:
    """A line a box and kind of formulas."""
    scan = Scan(*options.size, options.reach, options.beam)
    radar, place = Place(*options.radar), Place(*(options.camera or options.radar))
    camera = Camera(place, options.height, options.zero, options.chip, options.focal)
    with options.boxes.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                box = Box(*(float(row[name]) for name in "xywh"))
                for kind in get_args(Formula):
                    ship = place_of_bearing(radar, bearing_of_box(box, scan, kind))
                    second = bearing_of_place(place, ship)
                    width = width_of_box(box, scan, second.distance, kind)
                    yield Sight(box, kind, ship, second, width, aim(camera, second, width))
            except (KeyError, TypeError) as error:
                raise ValueError(f"{options.boxes} has no columns x, y, w and h") from error
            except ValueError as error:
                raise ValueError(f"{options.boxes}, line {number}: {error}") from error


def draw(options: Options, found: Sequence[Sight], path: Path) -> None:
    """From above, the radar's range and the camera's lines of sight; from the side, their tilt."""
    radar, camera = Place(*options.radar), Place(*(options.camera or options.radar))
    colours = {"corrected": PALETTE[0], "printed": LONE}

    def at(place: Place) -> tuple[float, float]:  # kilometres east and north of the radar
        seen = bearing_of_place(radar, place)
        angle, distance = math.radians(seen.azimuth), seen.distance / 1000
        return distance * math.sin(angle), distance * math.cos(angle)

    with drawing(path, (8.2, 4.2)) as figure:
        above, side = figure.subplots(1, 2, width_ratios=(1, 1.2))
        reach = options.reach / 1000
        above.add_patch(Circle((0, 0), reach, fill=False, linestyle=":", color="#888888"))
        above.plot(0, 0, "k^", label="radar, P1")
        above.plot(*at(camera), "ks", label="camera, P3")
        for sight in found:
            colour, (east, north) = colours[sight.formula], at(sight.place)
            first = next(one for one in found if one.formula == sight.formula) is sight
            told = f"ship, {sight.formula} formulas" if first else None
            above.plot(*zip(at(camera), (east, north), strict=True), color=colour, linewidth=0.8)
            hollow = "none" if sight.formula == "printed" else colour
            above.plot(east, north, "o", color=colour, markerfacecolor=hollow, label=told)
            distance = sight.bearing.distance / 1000
            side.plot([0, distance], [options.height, 0], color=colour, linewidth=0.8)
            side.plot(distance, 0, "o", color=colour, markerfacecolor=hollow)
            if sight.formula == "corrected":
                number = found.index(sight) // len(colours) + 1
                for axes, where in ((above, (east, north)), (side, (distance, 0))):
                    axes.annotate(str(number), where, (4, 5), textcoords="offset points")
        both = zip(*(iter(found),) * len(colours), strict=True)
        lines = [
            f"{n}: {one.width:,.0f} m, {two.width:,.0f} m" for n, (one, two) in enumerate(both, 1)
        ]
        told = "\n".join(["width W, corrected and printed", *lines[:5]])
        side.text(1, 1, told, transform=side.transAxes, ha="right", va="top", fontsize=8)
        above.set(xlabel="east of the radar, km", ylabel="north, km", aspect="equal")
        above.set(xlim=(-1.1 * reach, 1.1 * reach), ylim=(-1.1 * reach, 1.1 * reach))
        side.plot(0, options.height, "ks")
        side.axhline(0, color="#88CCEE", zorder=0)
        side.set(xlabel="distance from the camera, D2, km", ylabel="height, L, m")
        side.set_ylim(-0.15 * options.height, 1.8 * options.height)
        side.margins(x=0.15)
        side.set_yticks([0, options.height])
        figure.legend(loc="outside lower center", ncols=4)
