"""The folder of a quantized model: its format, its manifest, its way into transformers."""
