"""The cosine transform of perceptual hashes, with numpy alone (docs/decisions/structure.md: the image has no SciPy).

The steps and their order are those of pocketfft, which SciPy's dct calls, and numpy's FFT for the step in the middle. So every
bit of the result is SciPy's, and so is every bit of a hash, also where a picture's symmetry makes coefficients equal.

Source: M. Reinecke, pocketfft (BSD-3-Clause), class T_dcst23 and class sincos_2pibyn.
"""

from __future__ import annotations

import functools
import math

import numpy as np


def cosine_transform(x: np.ndarray) -> np.ndarray:
    """The DCT-II of the last axis, float64, not normalised: scipy.fftpack.dct(x). The axis has a length of 4,
    8, 16 and so on: for others a bit may differ."""
    length = x.shape[-1]
    assert length >= 4 and length & (length - 1) == 0, length
    values = x.astype(np.float64)
    spectrum = np.zeros((*values.shape[:-1], length // 2 + 1), np.complex128)
    spectrum.real[..., 0] = 2 * values[..., 0]
    spectrum.real[..., -1] = 2 * values[..., -1]
    odd, even = values[..., 1:-1:2], values[..., 2::2]
    spectrum.real[..., 1:-1] = even + odd
    spectrum.imag[..., 1:-1] = even - odd
    out = np.fft.irfft(spectrum, length, norm="forward")
    cosines = _cosines(length)
    low = np.arange(1, length // 2)
    high = length - low
    a, b = out[..., low], out[..., high]
    p = cosines[low - 1] * b + cosines[high - 1] * a
    q = cosines[low - 1] * a - cosines[high - 1] * b
    out[..., low], out[..., high] = 0.5 * (p + q), 0.5 * (p - q)
    out[..., length // 2] *= cosines[length // 2 - 1]
    return out


@functools.cache
def _cosines(length: int) -> np.ndarray:
    """float64 [length]: cos(pi/2 * i / length) for i from 1, each the product of two rotations, rounded as pocketfft does."""
    circle = 4 * length
    bits = 1
    while 4**bits < (circle + 2) // 2:
        bits += 1

    def rotation(index: int) -> complex:
        eighth = 8 * index
        angle = 0.25 * math.pi / circle
        if eighth >= 2 * circle:
            return complex(-math.sin((eighth - 2 * circle) * angle), math.cos((eighth - 2 * circle) * angle))
        if eighth >= circle:
            return complex(math.sin((2 * circle - eighth) * angle), math.cos((2 * circle - eighth) * angle))
        return complex(math.cos(eighth * angle), math.sin(eighth * angle))

    fine = 2**bits - 1
    pairs = [(rotation(i & fine), rotation(i & ~fine)) for i in range(1, length + 1)]
    return np.array([a.real * b.real - a.imag * b.imag for a, b in pairs])
