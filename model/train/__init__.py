"""Training on torchtitan: the only package that imports it.

torchtitan chooses its device when it is imported, and believes in accelerators. Importing any module of this package
first imports `model.train.device`, which sets the device where there is none.
"""

from model.train import device as device
