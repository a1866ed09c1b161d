"""Text-prompted SAM: pretrained backbones, prompts, the text encoder, and networks trained from nothing."""
