"""ImageNet, from its folders of class folders, streamed.

    root/train/n01440764/*.JPEG      1000 folders, 1,281,167 images
    root/val/n01440764/*.JPEG        50,000 images, sorted into folders of the same names

Any data of that layout will do. Files are listed once, and read when a batch needs them.

Source: Russakovsky et al., arXiv:1409.0575; normalised with the mean and deviation per channel that are usual for it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from stalewise.data.dataset import DataSplit
from stalewise.data.folder import mixed, train_and_test_classes
from stalewise.data.streamed import FileNames, StreamedImages
from stalewise.errors import DataError

__all__ = ["IMAGENET_SIZE", "load_imagenet"]

IMAGENET_SIZE = 224
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def load_imagenet(root: Path | None, *, size: int = IMAGENET_SIZE) -> DataSplit:
    """List the images below `root`.

    Args:
        root: with the folders train and val (or test); None where the user gave none.
        size: height and width of the images in a batch.

    Raises:
        DataError: where there is no such folder, or a class has no image.
    """
    if root is None:
        raise DataError(
            "imagenet cannot be downloaded; it has to be on the disk. Give the folder that holds train/<class> and "
            "val/<class> as --data-dir."
        )
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; --data-dir has to hold train/<class> and val/<class>.")
    train, test = train_and_test_classes(root)
    class_names = tuple(train)
    sets = []
    for split, classes in (("train", train), ("test", test)):
        files, labels = mixed(classes, class_names)
        sets.append(
            StreamedImages(
                name=f"{root.name} {split}",
                root=root,
                files=FileNames([str(file.relative_to(root)) for file in files]),
                labels=torch.tensor(labels, dtype=torch.int64),
                class_names=class_names,
                size=size,
            )
        )
    return DataSplit(train=sets[0], test=sets[1], mean=_MEAN, std=_STD, num_classes=len(class_names))
