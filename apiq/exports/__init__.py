"""A quantized model in the formats of other programs: the same codes, scales and zero points, or a refusal."""
