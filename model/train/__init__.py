"""The torchtitan integration.

Python runs this file before any module of the package: torchtitan is prepared for machines without an accelerator before
anything in here imports it, whatever the order of imports in a module.
"""

from model.train import device  # noqa: F401
