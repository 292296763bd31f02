"""Image sets: loading, batches, augmentation. Importing this reads no data and no TensorFlow."""

from adderflax.data.config import AugmentConfig, DataConfig, DatasetInfo, DatasetNotReadyError
from adderflax.data.device import augment_batch, normalize_batch
from adderflax.data.images import preprocess_image
from adderflax.data.loading import load_dataset
from adderflax.data.pipeline import evaluation_batches, train_iterator
from adderflax.data.sources import Dataset

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "Dataset",
    "DatasetInfo",
    "DatasetNotReadyError",
    "augment_batch",
    "evaluation_batches",
    "load_dataset",
    "normalize_batch",
    "preprocess_image",
    "train_iterator",
]
