"""Images in ImageNet's layout, made on the spot, for trying the whole way from files to a trained network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stalewise.experiments.experiment import GeneratedImages

__all__ = ["generate_images"]


def generate_images(root: Path, wanted: GeneratedImages) -> None:
    """Write root/train/<class>/*.JPEG and root/val/<class>/*.JPEG, unless they are there.

    A class is a direction and a frequency of stripes; an image adds a phase and noise.
    """
    from PIL import Image

    for split, count in (("train", wanted.per_class), ("val", max(1, wanted.per_class // 4))):
        for label in range(wanted.classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                file = folder / f"{split}_{index}.JPEG"
                if not file.is_file():
                    generator = np.random.default_rng([label, index, int(split == "val")])
                    Image.fromarray(_striped(label, wanted, generator)).save(file, "JPEG", quality=90)


def _striped(label: int, wanted: GeneratedImages, generator: np.random.Generator) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[0 : wanted.size, 0 : wanted.size] / wanted.size
    angle = np.pi * label / wanted.classes
    phase = generator.uniform(0, 2 * np.pi, 3)
    waves = 2 * np.pi * (3 + label) * (rows * np.sin(angle) + columns * np.cos(angle))
    pixels = 127 + 80 * np.sin(waves[:, :, None] + phase) + generator.normal(0, 15, (wanted.size, wanted.size, 3))
    return np.asarray(pixels.clip(0, 255), dtype=np.uint8)
