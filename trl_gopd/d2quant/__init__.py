"""D2Quant, weight-only quantization below four bits: https://huggingface.co/papers/2602.02546."""
