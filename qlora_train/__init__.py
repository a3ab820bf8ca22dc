"""Fine-tune language models with QLoRA from one YAML file.

Importing the package is cheap: torch and the libraries above it are imported by the stage that needs them.
"""

import logging

__version__ = "0.1.0"

# warns at import, in every process, that a kernel of an optional package is missing; it has one of its own
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
