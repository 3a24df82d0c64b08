# ruff: noqa: C408
"""All bands for the teacher, red, green and blue for the student.

python torchgeo_samples.py FOLDER CLASSES

FOLDER has GeoTIFFs of bands in train/images and test/images, and of classes in
train/masks and test/masks.
"""

import sys

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, default_collate

import structkd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 10_000  # Sentinel-2 stores reflectance in ten-thousandths


def collate(samples):
    # The rest of a torchgeo sample, its CRS for example, does not stack.
    return default_collate(
        [{key: sample[key] for key in ("image", "mask")} for sample in samples]
    )


def unet(bands, classes, backbone=None):
    """Makes a U-Net; its encoder takes the weights of a timm resnet18."""
    net = smp.Unet(
        "tu-resnet18", encoder_weights=None, in_channels=bands, classes=classes
    )
    if backbone is not None:
        state, encoder = backbone.state_dict(), net.encoder.model
        encoder.load_state_dict(
            {name: state[name] for name in encoder.state_dict()}
        )
    return net.to(DEVICE)


def train(network, bands, loader, epochs, teacher=None):
    module = network
    if teacher is not None:
        dense = 5 * structkd.DenseStructureLoss()
        module = structkd.Distiller(
            network, teacher, dense, layers=dict(intermediate="all")
        )
    optimizer, losses = torch.optim.AdamW(module.parameters(), lr=1e-3), []
    for _ in range(epochs):
        module.train()
        for batch in loader:
            rich, mask = batch["image"].to(DEVICE) / SCALE, batch["mask"].to(DEVICE)
            poor, terms = rich[:, bands], {}
            if teacher is None:
                output = network(poor)
            else:
                output, terms = module(poor, mask, x_teacher=rich)
            loss = F.cross_entropy(output, mask, ignore_index=-100) + sum(
                terms.values()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@torch.no_grad()
def iou(network, bands, loader, classes):
    """Returns the IoU of each class, by counts over all pixels; nan for none."""
    network.eval()
    counts = 0
    for batch in loader:
        found = network(batch["image"][:, bands].to(DEVICE) / SCALE).argmax(1).cpu()
        stats = smp.metrics.get_stats(
            found,
            batch["mask"],
            "multiclass",
            ignore_index=-100,
            num_classes=classes,
        )
        counts = counts + torch.stack(stats).sum(1)  # of all images: tp, fp, fn, tn
    return counts[0] / counts[:3].sum(0)


def compare(loader, test, classes, rgb=(3, 2, 1), backbone=None, epochs=20):
    """Takes loaders of dicts: image (C, H, W), mask (H, W), -100 for no label."""
    every, rgb = list(range(next(iter(test))["image"].shape[1])), list(rgb)
    teacher = unet(len(every), classes, backbone)
    alone, student = unet(len(rgb), classes), unet(len(rgb), classes)
    for name, network, bands, taught_by in (
        ("teacher", teacher, every, None),
        ("labels alone", alone, rgb, None),
        ("distilled", student, rgb, teacher),
    ):
        train(network, bands, loader, epochs, taught_by)
        print(
            f"{name:12}",
            *(f"{value:6.1%}" for value in iou(network, bands, test, classes)),
        )
    return teacher, student


def main(folder, classes, size=256, batch_size=16, **options):
    from torchgeo.datasets import RasterDataset
    from torchgeo.samplers import GridGeoSampler, RandomGeoSampler

    class Masks(RasterDataset):
        is_image = False

    loaders = []
    for part, sampler in (("train", RandomGeoSampler), ("test", GridGeoSampler)):
        data = RasterDataset(f"{folder}/{part}/images") & Masks(
            f"{folder}/{part}/masks"
        )
        patches = sampler(data, size)
        loaders.append(
            DataLoader(data, batch_size, sampler=patches, collate_fn=collate)
        )
    return compare(*loaders, int(classes), **options)


if __name__ == "__main__":
    main(*sys.argv[1:3])
