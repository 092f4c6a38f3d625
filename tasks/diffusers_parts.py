"""Facts about the parts of a diffusers pipeline: the scheduler's configuration, the class of the processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# The released configuration: with shift 1 and without dynamic shifting, sigmas are linear from 1 to 1/steps.
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
}

# Class names come from untrusted files: only these classes are looked up.
PROCESSORS = (
    "Qwen3VLProcessor",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
)


def processor_class(directory: Path) -> str:
    """The class named in the files of a processor: a processor, or a tokenizer alone, which the pipeline also accepts
    (a Qwen3VLProcessor needs torchvision for its video part).

    Raises:
        ValueError: no class is named, or one that is not in `PROCESSORS`.
    """
    for name, key in (
        ("processor_config.json", "processor_class"),
        ("preprocessor_config.json", "processor_class"),
        ("tokenizer_config.json", "processor_class"),
        ("tokenizer_config.json", "tokenizer_class"),
    ):
        path = directory / name
        if path.is_file() and (class_name := json.loads(path.read_text()).get(key)):
            if class_name not in PROCESSORS:
                raise ValueError(f"{path} names the class {class_name!r}; it must be one of {', '.join(PROCESSORS)}")
            return class_name
    raise ValueError(f"{directory} names neither a processor_class nor a tokenizer_class in its configs")
