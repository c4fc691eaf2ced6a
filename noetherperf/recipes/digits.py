"""Handwritten digits: 1,797 real images of 8×8 pixels that come with scikit-learn, so nothing is downloaded."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

__all__ = ["Digits", "load"]

SIZE = 8
TEST_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Digits:
    """The two parts of the data set; images have mean 0 and standard deviation 1 over the 8×8 training pixels.

    Args:
        train_images: [n_train, 1, size, size], floating point.
        train_labels: [n_train], int64, 0 to 9.
        test_images: [n_test, 1, size, size], floating point.
        test_labels: [n_test], int64, 0 to 9.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(
    seed: int = 0,
    *,
    image_size: int = SIZE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Digits:
    """Split the digits, a fifth for testing, with the same share of every digit in both parts.

    Args:
        seed: Draws the split.
        image_size: Pixels of a side; if not 8, images are enlarged (or reduced) bilinearly.
        device: Device of the tensors.
        dtype: Dtype of the images.

    Returns:
        Digits with n_train = 1437 and n_test = 360.
    """
    pixels, digits = load_digits(return_X_y=True)
    train_pixels, test_pixels, train_digits, test_digits = train_test_split(
        pixels, digits, test_size=TEST_SHARE, stratify=digits, random_state=seed
    )
    mean, std = train_pixels.mean(), train_pixels.std()  # of the training part only: the test part stays unseen

    def images(rows: np.ndarray[Any, Any]) -> Tensor:
        small = torch.as_tensor((rows - mean) / std, dtype=dtype, device=device).reshape(-1, 1, SIZE, SIZE)
        if image_size == SIZE:
            return small
        return nn.functional.interpolate(small, size=(image_size, image_size), mode="bilinear")

    def labels(column: np.ndarray[Any, Any]) -> Tensor:
        return torch.as_tensor(column, dtype=torch.int64, device=device)

    return Digits(images(train_pixels), labels(train_digits), images(test_pixels), labels(test_digits))
