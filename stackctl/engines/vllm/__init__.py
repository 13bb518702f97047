"""vLLM, on GPUs and on a CPU."""
