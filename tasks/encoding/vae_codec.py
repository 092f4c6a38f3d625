"""Encodes and decodes still images with `AutoencoderKLQwenImage` by 2-D convolutions.

The VAE is a causal video model. For a single frame, the past of every causal Conv3d is zero, so only the last temporal
slice of its kernel contributes: it equals a Conv2d with `weight[:, :, -1]`. The temporal convolutions of the resampling
layers are skipped for the first frame (diffusers 0.42.1, `QwenImageResample.forward`). 2-D convolutions in channels-last
layout are several times faster on a CPU. Results equal `vae.encode` and `vae.decode` of a single frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLQwenImage


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1], channels last in memory."""
    import torch

    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


class FrameCodec:
    """Encodes and decodes batches of single frames with the weights of `vae`.

    The 2-D kernels are copies, so that training does not store or update the temporal slices of the past; `write_back`
    copies them into the VAE.
    """

    def __init__(self, vae: AutoencoderKLQwenImage):
        import torch
        from diffusers.models.autoencoders import autoencoder_kl_qwenimage as source

        self.vae, self._source = vae, source
        self.kernels = {
            module: torch.nn.Parameter(
                module.weight[:, :, -1].detach().clone(memory_format=torch.contiguous_format),
                requires_grad=module.weight.requires_grad,
            )
            for name, module in vae.named_modules()
            if isinstance(module, source.QwenImageCausalConv3d) and not name.endswith("time_conv")
        }

    @property
    def device(self) -> torch.device:
        return self.vae.quant_conv.bias.device

    def matrices(self) -> list[torch.nn.Parameter]:
        """Kernels [out, in, k, k] of the inner layers, which Muon optimises."""
        import torch

        vae = self.vae
        ends = {vae.encoder.conv_in, vae.encoder.conv_out, vae.decoder.conv_in, vae.decoder.conv_out}
        ends |= {vae.quant_conv, vae.post_quant_conv}
        flat = [module.weight for module in vae.modules() if isinstance(module, torch.nn.Conv2d)]
        return [kernel for module, kernel in self.kernels.items() if module not in ends] + flat

    def others(self) -> list[torch.nn.Parameter]:
        """All other parameters that a single frame uses: first and last kernels, biases, norms."""
        known = {id(p) for p in self.matrices()} | {id(module.weight) for module in self.kernels}
        plain = [p for name, p in self.vae.named_parameters() if "time_conv" not in name and id(p) not in known]
        return [
            kernel for kernel in self.kernels.values() if id(kernel) not in {id(p) for p in self.matrices()}
        ] + plain

    def write_back(self) -> None:
        """Copies the 2-D kernels into the VAE and sets all other temporal slices to zero, which treats the frames of a
        video independently."""
        import torch

        with torch.no_grad():
            for module, kernel in self.kernels.items():
                module.weight.zero_()
                module.weight[:, :, -1] = kernel

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance [B, z, H/8, W/8] of the posterior of images [B, 3, H, W] in [-1, 1]."""
        import torch

        encoder = self.vae.encoder
        x = self._conv(encoder.conv_in, images.contiguous(memory_format=torch.channels_last))
        for layer in encoder.down_blocks:
            x = self._layer(layer, x)
        x = self._head(encoder, self._middle(encoder.mid_block, x))
        mean, logvar = self._conv(self.vae.quant_conv, x).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] of latents [B, z, H/8, W/8], NOT clamped to [-1, 1] (`vae.decode` clamps)."""
        import torch

        decoder = self.vae.decoder
        x = latents.contiguous(memory_format=torch.channels_last)
        x = self._conv(decoder.conv_in, self._conv(self.vae.post_quant_conv, x))
        x = self._middle(decoder.mid_block, x)
        for block in decoder.up_blocks:
            for layer in [*block.resnets, *(block.upsamplers or ())]:
                x = self._layer(layer, x)
        return self._head(decoder, x)

    def _conv(self, module, x):
        from torch.nn.functional import conv2d

        left, _, top, _, _, _ = module._padding
        return conv2d(x, self.kernels[module], module.bias, module.stride[1:], (top, left))

    def _norm(self, module, x):
        from torch.nn.functional import normalize

        unit = normalize(x.float(), dim=1).to(x.dtype)  # fp32 as diffusers does for half precision
        return unit * (module.scale * module.gamma.view(1, -1, 1, 1)) + module.bias

    def _layer(self, layer, x):
        if isinstance(layer, self._source.QwenImageResidualBlock):
            return self._residual(layer, x)
        assert isinstance(layer, self._source.QwenImageResample), type(layer)
        return layer.resample(x)

    def _residual(self, block, x):
        from torch.nn.functional import silu

        causal = isinstance(block.conv_shortcut, self._source.QwenImageCausalConv3d)
        shortcut = self._conv(block.conv_shortcut, x) if causal else x
        x = self._conv(block.conv1, silu(self._norm(block.norm1, x)))
        return self._conv(block.conv2, block.dropout(silu(self._norm(block.norm2, x)))) + shortcut

    def _attention(self, block, x):
        from torch.nn.functional import scaled_dot_product_attention

        batch, channels, height, width = x.shape
        qkv = block.to_qkv(self._norm(block.norm, x)).flatten(2).transpose(1, 2)[:, None]
        q, k, v = qkv.chunk(3, dim=-1)  # one head: [B, 1, H*W, channels]
        out = scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + block.proj(out.reshape(batch, channels, height, width))

    def _middle(self, block, x):
        x = self._residual(block.resnets[0], x)
        for attention, residual in zip(block.attentions, block.resnets[1:], strict=True):
            x = self._residual(residual, self._attention(attention, x))
        return x

    def _head(self, part, x):
        from torch.nn.functional import silu

        return self._conv(part.conv_out, silu(self._norm(part.norm_out, x)))


def reconstruct(codec: FrameCodec, pixels: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Encodes uint8 [n, H, W, 3] to the posterior's mean and decodes it to uint8 of the same shape."""
    import torch

    out = []
    with torch.inference_mode():
        for start in range(0, len(pixels), batch_size):
            mean, _ = codec.encode(to_tensor(pixels[start : start + batch_size]).to(codec.device))
            image = codec.decode(mean).clamp_(-1.0, 1.0).add_(1.0).mul_(127.5).round_()
            out.append(image.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy())
    return np.concatenate(out)
