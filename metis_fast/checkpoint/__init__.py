"""What a run needs to go on exactly where it stopped (`resume`), and models in the Hugging Face layout (`export`)."""
