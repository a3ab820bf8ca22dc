"""Fine-tune language models with QLoRA from one YAML file.

Importing the package is cheap: torch and the libraries above it are imported by the stage that needs them.
"""

__version__ = "0.1.0"
