"""Data sets in memory, and reproducible batches of them."""

from stalewise.data.augment import augment, normalise
from stalewise.data.batches import Batches
from stalewise.data.cache import default_cache_dir
from stalewise.data.dataset import DataSplit, ImageDataset
from stalewise.data.load import DATA_NAMES, load_data

__all__ = [
    "DATA_NAMES",
    "Batches",
    "DataSplit",
    "ImageDataset",
    "augment",
    "default_cache_dir",
    "load_data",
    "normalise",
]
