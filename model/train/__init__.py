"""The torchtitan integration.

Python runs this file before any module of the package, so torchtitan is prepared for machines without an accelerator
before any of them imports it.
"""

from model.train import device  # noqa: F401
