"""debLoRA end to end: features, clusters, de-biased centres, calibration, the LoRA learned towards them, probes."""
