"""The whole agent, its tools included, as a server of OpenAI's chat completions (docs/serve.md)."""
