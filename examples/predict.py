"""Use a trained student: ``python examples/predict.py CHECKPOINT IMAGE...``.

Prints the classes of images with their probabilities, or for a student of ``segment.py`` the share
of pixels of each; ``--masks DIR`` writes the pixels' classes. ``--onnx FILE`` and ``--torch-export
FILE`` write the network to a file that takes raw images (N, bands, H, W), float32 in the images'
own numbers (0 to 255 for photographs), normalises inside and gives logits. Its logits are compared
with the checkpoint's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from PIL import Image
from torch import Tensor, nn

import models
from data.decode import fitted, read_bands, read_colours
from job import reported
from store import read_checkpoint, write_atomically

_CLOSE = 1e-3  # of logits, between two engines


@dataclass(frozen=True)
class Options:
    # Checkpoint of a student or a teacher.
    checkpoint: tyro.conf.Positional[Path]
    # Images of the modality that it was trained on.
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    # How many classes to print for each image.
    top: int = 3
    # Folder for a PNG of each image, with every pixel's class as in the training masks.
    masks: Path | None = None
    # Write an ONNX file.
    onnx: Path | None = None
    # Write a file of torch.export.
    torch_export: Path | None = None


class Network(nn.Module):
    """A network that takes raw images: mean and deviation are inside."""

    mean: Tensor
    scale: Tensor

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__()
        self.network = models.create(content["network"], **content["arguments"])
        self.network.load_state_dict(content["weights"])
        self.pixels = "values" in content  # the pixel values of the classes in masks
        mean, std = (torch.tensor(content[name]).view(-1, 1, 1) for name in ("mean", "std"))
        self.register_buffer("mean", mean)
        self.register_buffer("scale", torch.where(std > 0, 1 / std, 0))  # a constant band is 0

    def forward(self, images: Tensor) -> Tensor:
        """(N, bands, H, W) as they are stored to logits (N, classes), or (N, classes, H, W)."""
        images = (images - self.mean) * self.scale
        if self.pixels:
            return models.padded(self.network, images)
        logits: Tensor = self.network(images)
        return logits


def load(path: Path) -> tuple[Network, dict[str, Any]]:
    """A checkpoint's network, ready to predict, and everything else in the file.

    Raises:
        ValueError: the file is damaged, or not of a student or teacher.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist; fix: name a .pt file of --out")
    content = read_checkpoint(path)
    if "classes" not in content:
        raise ValueError(f"checkpoint {path} says no classes: it is no student's or teacher's")
    return Network(content).eval(), content


def read(file: Path, content: dict[str, Any]) -> Tensor:
    """An image file (1, bands, H, W), in the size that the network was trained on."""
    bands, (height, width) = content["bands"], content["size"]
    if not file.is_file():
        told = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"image {file} {told}; fix: name an image file")
    image = read_bands(file)
    if image.shape[0] != bands and bands == 3 and image.shape[0] in (1, 2, 4):
        image = read_colours(file)
    if image.shape[0] != bands:
        raise ValueError(
            f"image {file} has {image.shape[0]} band(s), the network was trained on {bands} "
            f"({content['modality']}); fix: an image of that modality"
        )
    margin = content.get("margin", 1.0)  # as the training cut its images
    if (image.shape[1:] != (height, width) or margin != 1.0) and "values" not in content:
        if height != width:
            raise ValueError(
                f"image {file} is {image.shape[1]}x{image.shape[2]}, the network was trained on "
                f"{height}x{width}; fix: resize it"
            )
        image = fitted(image, height, margin=margin)
    return torch.tensor(image)[None].float()


def to_onnx(network: Network, file: Path, images: Tensor) -> float:
    """Write an ONNX file; the largest difference of its logits from the network's."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            "--onnx is checked by onnxruntime; fix: pip install onnx onnxscript onnxruntime"
        ) from error
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        network, (images,), dynamo=True, dynamic_shapes=({0: batch},), input_names=["images"],
        output_names=["logits"], verbose=False, external_data=False,
    )  # fmt: skip
    write_atomically(file, lambda path: program.save(str(path)))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    return _difference(network, images, torch.from_numpy(logits))


def to_export(network: Network, file: Path, images: Tensor) -> float:
    """Write a file of ``torch.export``; the largest difference of its logits, read back."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
    write_atomically(file, lambda path: torch.export.save(program, path))
    return _difference(network, images, torch.export.load(file).module()(images))


@torch.no_grad()
def _difference(network: Network, images: Tensor, logits: Tensor) -> float:
    own = network(images)
    found = float((own - logits).abs().max())
    if not found <= _CLOSE * max(1.0, float(own.abs().max())):
        raise ValueError(f"the written file's logits differ from the checkpoint's by {found:.2g}")
    return found


def _measured(content: dict[str, Any]) -> str:
    for name in ("accuracy", "IoU"):
        value = content.get(name)
        if isinstance(value, dict):  # a teacher's, by modality
            return "".join(f", {name} {v:.2f} % on {side}" for side, v in value.items())
        if value is not None:
            return f", {name} {value:.2f} % on test images"
    return ""


def _mask_files(folder: Path, images: Sequence[Path]) -> dict[Path, Path]:
    """Where each image's mask goes; none may take the place of an image or of another mask."""
    taken, files = {image.resolve() for image in images}, {}
    for image in images:
        file = files[image] = folder / f"{image.stem}.png"
        if file.resolve() in taken:
            raise ValueError(
                f"--masks {folder} would write {file} over an image or another image's mask; fix: "
                "another folder, or one for each folder of images"
            )
        taken.add(file.resolve())
    return files


def _mark(file: Path, marked: Tensor, values: list[int]) -> None:
    if not all(0 <= value < 256 for value in values):
        raise ValueError(f"--masks writes 8 bits, the classes are {values}")
    pixels = torch.tensor(values, dtype=torch.uint8)[marked].numpy()
    write_atomically(file, lambda path: Image.fromarray(pixels).save(path))


def predict(options: Options) -> int:
    network, content = load(options.checkpoint)
    accuracy = _measured(content)
    size = "x".join(map(str, content["size"]))
    print(
        f"{content['network']}, {len(content['classes'])} classes, {content['bands']} band(s) of "
        f"{size} ({content['modality']}){accuracy}"
    )
    if options.top < 1:
        raise ValueError(f"--top must be at least 1, got {options.top}")
    if options.masks is not None and not network.pixels:
        raise ValueError("--masks is for students of segment.py; fix: leave it out")
    masks = {} if options.masks is None else _mask_files(options.masks, options.images)
    found = [read(file, content) for file in options.images]
    for file, image in zip(options.images, found, strict=True):
        with torch.no_grad():
            logits = network(image)
        shares = logits.softmax(1)[0]
        if network.pixels:
            marked = logits.argmax(1)[0]
            shares = torch.bincount(marked.flatten(), minlength=len(shares)) / marked.numel()
            if file in masks:
                _mark(masks[file], marked, content["values"])
        best = shares.topk(min(options.top, len(shares)))
        told = ", ".join(
            f"{content['classes'][place]} {100 * share:.1f} %"
            for share, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
        print(f"{file}: {told}{' of the pixels' if network.pixels else ''}")
    if options.onnx is None and options.torch_export is None:
        return 0
    shape = (2, content["bands"], *content["size"])
    mean, std = (torch.tensor(content[name]).view(-1, 1, 1) for name in ("mean", "std"))
    drawn = mean + std * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    images = torch.cat([*(image for image in found if image.shape[1:] == shape[1:]), drawn])
    if options.onnx is not None:
        far = to_onnx(network, options.onnx, images)
        print(f"{options.onnx}: written, its logits differ by at most {far:.1g} (onnxruntime)")
    if options.torch_export is not None:
        far = to_export(network, options.torch_export, images)
        print(f"{options.torch_export}: written, its logits differ by at most {far:.1g}")
    return 0


if __name__ == "__main__":
    sys.exit(reported(lambda: predict(tyro.cli(Options)), trains=False))
