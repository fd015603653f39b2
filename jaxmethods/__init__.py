"""Post-training of language and vision-language models in JAX: pure functions and Flax modules that compose.

Import the room you need: `jaxmethods.models`, `.adapters`, `.losses`, `.generation`, `.data`, `.training`.
"""

__version__ = "0.1.0"
