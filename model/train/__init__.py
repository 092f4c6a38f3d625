"""Training on torchtitan, which `model.train.device` prepares for this machine before any module here imports it."""

from model.train import device  # noqa: F401
