"""The handwritten digits that come with scikit-learn: no download, and small enough for a first run."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from stalewise.data.dataset import DataSplit, ImageDataset

__all__ = ["load_digits"]

_SIDE = 32
_LARGEST_VALUE = 16
_TEST_SAMPLES = 360
_SPLIT_SEED = 0


def load_digits() -> DataSplit:
    """1,437 training and 360 test images of ten digits, 8 x 8 upsampled to 32 x 32 in three equal channels.

    The split is stratified and always the same. A mirrored digit is no digit, so `flip` is false.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
    1998; scikit-learn bundles its test part.
    """
    from sklearn.datasets import load_digits as load_bundled_digits
    from sklearn.model_selection import train_test_split

    bundled = load_bundled_digits()
    values = torch.from_numpy(bundled.images).to(torch.float32).unsqueeze(1)
    upsampled = F.interpolate(values, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)
    images = (upsampled * (255 / _LARGEST_VALUE)).round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(bundled.target).to(torch.int64)
    train_indices, test_indices = train_test_split(
        np.arange(len(labels)), test_size=_TEST_SAMPLES, random_state=_SPLIT_SEED, stratify=bundled.target
    )
    class_names = tuple(str(digit) for digit in range(10))
    train, test = (
        ImageDataset(
            name=f"digits {split}",
            images=images[torch.from_numpy(indices)],
            labels=labels[torch.from_numpy(indices)],
            class_names=class_names,
            flip=False,
        )
        for split, indices in (("train", train_indices), ("test", test_indices))
    )
    return DataSplit.normalised_by_train(train, test)
