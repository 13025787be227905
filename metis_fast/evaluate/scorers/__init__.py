"""Rules that score a reply: ours, which say nothing where they cannot tell, and VLMEvalKit's, quirks included."""
