"""Which optional libraries of Megatron are installed; found without importing them."""

import importlib.util

HAS_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None
