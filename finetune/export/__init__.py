"""A finished run made ready to serve: merged weights, GGUF, Ollama, vLLM, the Hub."""
