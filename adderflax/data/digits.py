"""`digits`: scikit-learn's 1,797 real handwritten digits, the set that needs no network."""

import numpy as np

NUM_CLASSES = 10
SIZE = 8

# Of the images outside the held-out fifth, in units of 0..1.
MEAN = (0.3058,)
STD = (0.3764,)

# Fixed for good: figures on digits are only comparable while the held-out images are the same.
_TEST_SEED = 0
_TEST_FRACTION = 0.2


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Reads the images from scikit-learn, which carries them.

    Returns:
      uint8 images [1797, 8, 8, 1], scaled from 0..16 to 0..255, and int32 labels [1797].

    Raises:
      DatasetNotReadyError: if scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        from adderflax.data.config import DatasetNotReadyError

        raise DatasetNotReadyError(
            "The digits come with scikit-learn, which is not installed here: "
            "`pip install scikit-learn`, or everything a run needs at once with "
            "`pip install '.[train]'` or `pip install -r requirements.txt` in the checkout."
        ) from error
    raw = datasets.load_digits()
    images = np.rint(raw.images * (255.0 / 16.0)).astype(np.uint8)
    return images[..., None], raw.target.astype(np.int32)


def test_indices(labels: np.ndarray) -> np.ndarray:
    """Chooses the held-out fifth: a fifth of each class, always the same images.

    Args:
      labels: int32 [N].

    Returns:
      Sorted positions of the held-out images.
    """
    # RandomState, not Generator: NumPy keeps its streams the same for all versions to come.
    random = np.random.RandomState(_TEST_SEED)
    chosen = []
    for label in range(NUM_CLASSES):
        of_class = np.flatnonzero(labels == label)
        count = round(len(of_class) * _TEST_FRACTION)
        chosen.append(random.permutation(of_class)[:count])
    return np.sort(np.concatenate(chosen))
