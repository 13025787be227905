"""vLLM engines: the door to vllm. Nothing outside this folder imports it, and here only what runs in an engine's process."""
