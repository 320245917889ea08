"""Talking to a model: one conversation and its calls, in the terminal, on a page, for an OpenAI client."""
