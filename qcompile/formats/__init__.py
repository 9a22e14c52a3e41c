"""Files of other quantization libraries: one module a format."""
