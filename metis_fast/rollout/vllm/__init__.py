"""vLLM engines. The door to vllm: nothing outside this folder imports it, and here only what runs in an engine's process does."""
