"""The two linears of a quantized model: one that calibrates, one that is deployed."""
