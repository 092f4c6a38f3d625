"""Rotary position embedding on three axes (frame, row, column), centred on the image. Text positions follow the image's.

Shape suffixes: B batch, S image tokens, T text tokens, N heads, H head dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch

THETA = 10000.0
ImageShape = tuple[int, int, int]


def image_shape(img_shapes: ImageShape | list[ImageShape], num_tokens: int) -> ImageShape:
    """(frames, rows, columns) of all images of a batch, from diffusers' `img_shapes`.

    Raises:
        ValueError: images of several shapes in one batch, or a shape whose product is not `num_tokens`.
    """
    shapes = {tuple(shape) for shape in img_shapes} if isinstance(img_shapes, list) else {tuple(img_shapes)}
    if len(shapes) != 1:
        raise ValueError(f"a batch holds images of one shape, got img_shapes {sorted(shapes)}")
    (shape,) = shapes
    if len(shape) != 3 or shape[0] * shape[1] * shape[2] != num_tokens:
        raise ValueError(f"img_shapes {shape} must be (frames, rows, columns) with {num_tokens} tokens in all")
    return shape


def _angles(positions: torch.Tensor, dim: int) -> torch.Tensor:
    frequencies = 1.0 / torch.pow(THETA, torch.arange(0, dim, 2, device=positions.device).float().div(dim))
    return torch.outer(positions.float(), frequencies)


def rope_angles(
    axes_dims: tuple[int, int, int], shape: ImageShape, text_tokens: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles of the image tokens [S, H/2] and of the text tokens [T, H/2], fp32, in radians.

    Rows and columns are centred: of n positions, the first n - n//2 are negative. Text positions start at
    max(rows, columns) // 2 and are equal on all three axes (diffusers' `NucleusMoEEmbedRope`, scale_rope).
    """
    frames, rows, columns = shape
    axes = [torch.arange(frames, device=device)]
    axes += [torch.arange(-(n - n // 2), n // 2, device=device) for n in (rows, columns)]
    frame, row, column = (_angles(positions, dim) for positions, dim in zip(axes, axes_dims))
    image = torch.cat(
        [
            frame[:, None, None].expand(frames, rows, columns, -1),
            row[None, :, None].expand(frames, rows, columns, -1),
            column[None, None, :].expand(frames, rows, columns, -1),
        ],
        dim=-1,
    ).reshape(frames * rows * columns, -1)
    positions = torch.arange(text_tokens, device=device) + max(rows // 2, columns // 2)
    text = torch.cat([_angles(positions, dim) for dim in axes_dims], dim=-1)
    return image, text


@lru_cache(maxsize=128)
def _cached_tables(axes_dims, shape, text_tokens, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    image, text = rope_angles(axes_dims, shape, text_tokens, device)
    # [S, 1, H/2, 2]: cos and sin are adjacent, so that a pair can be viewed as one complex number without a copy.
    return tuple(torch.stack((a.cos(), a.sin()), dim=-1).unsqueeze(-3) for a in (image, text))


def rope_tables(
    axes_dims: tuple[int, int, int], shape: ImageShape, text_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) pairs [S, 1, H/2, 2] of the image and [T, 1, H/2, 2] of the text, fp32.

    They are not module buffers, so that they are not saved and need not be materialised after a meta-device init. They
    are cached per shape, except in compiled and fake-tensor code, where a cached tensor would belong to another trace.
    """
    if torch.compiler.is_compiling() or _is_fake(device):
        return _cached_tables.__wrapped__(axes_dims, shape, text_tokens, str(device))
    with torch.inference_mode(False), torch.no_grad():
        return _cached_tables(axes_dims, shape, text_tokens, str(device))


def _is_fake(device: torch.device) -> bool:
    return device.type == "meta" or type(torch.empty(0)) is not torch.Tensor


def apply_rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (x[2i], x[2i+1]) of `x` [B, S, N, H] by the angles of `table` [S, 1, H/2, 2], in fp32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling() and x.device.type == "cpu":
        # One complex product is 4 to 10 times faster on a CPU than the real formula, whose strided halves do not
        # vectorise. torch.compile fuses the real formula but does not support complex numbers.
        rotated = torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(table)
        return torch.view_as_real(rotated).flatten(-2).to(x.dtype)
    real, imag = pairs.unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1).flatten(-2).to(x.dtype)
